"""What a config's data will do, before anything is decoded: the stages by source, and a look at the plan itself."""

import numpy as np
from rich.table import Table
from rich.text import Text

from mmoe.commands.console import Console
from mmoe.data.config import DataConfig
from mmoe.data.index.shard_index import is_prepared
from mmoe.data.plan.deal import deal
from mmoe.data.plan.mixture import Mixture
from mmoe.data.plan.planner import Planner
from mmoe.data.plan.prepared import Sources, sizes
from mmoe.data.storage.store import Storage
from mmoe.recipe.config import RunConfig
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.bundle import TokenizersConfig

WARNING = Text("warning", "yellow")


def mixture_of(data: DataConfig, tokenizers: TokenizersConfig, end: int) -> Mixture:
    """Mix the sources of a run of `end` positions; those whose `positions` are given need not be prepared yet."""
    storage = Storage(data.storage)
    unknown = {
        name: SourceManifest.load(source.shards, storage.read)
        for name, source in data.sources.items()
        if source.positions is None and is_prepared(source.shards, storage)
    }
    built = tokenizers.build(unknown, storage.read) if unknown else None
    return Mixture(data.stages, sizes(data, unknown, built), end)


def show_stages(config: RunConfig, console: Console) -> None:
    """Positions, share and epochs of every source in every stage; then the warnings."""
    end = config.training.budget_positions
    mixture = mixture_of(config.data, config.tokenizers, end)
    table = Table("stage", "positions", "T", "source", "share", "its positions", "epochs", title_justify="left")
    for column in (1, 2, 4, 5, 6):
        table.columns[column].justify = "right"
    table.columns[3].overflow = "fold"
    for stage in mixture.stages:
        temperature = stage.config.temperature
        head = [
            stage.name,
            f"{si(stage.start)} .. {si(stage.stop)}",
            "weights" if temperature is None else " to ".join(f"{t:g}" for t in np.atleast_1d(temperature)),
        ]
        for source, plan in zip(mixture.sources, mixture.expected(stage), strict=True):
            if plan.share:
                table.add_row(*head, source.name, f"{plan.share:.2%}", si(plan.positions), f"{plan.epochs:.2f}")
                head = ["", "", ""]
        table.add_section()
    console.print(table)
    steps = ", ".join(f"{s.name} from step {s.start // config.batch.global_batch_positions:,}" for s in mixture.stages)
    console.print(f"{config.batch.iterations:,} steps of {config.batch.global_batch_positions:,} positions: {steps}")
    for stage in mixture.stages:
        if stage.start >= end:
            console.print(
                WARNING,
                f"stage {stage.name} begins at {si(stage.start)}, after the run's end {si(end)}",
            )
    for sentence in mixture.warnings():
        console.print(WARNING, sentence, soft_wrap=True)


def inspect(config: RunConfig, steps: int, replicas: int, console: Console) -> None:
    """Plan so many steps from the start of the run and tell what is in them; nothing is decoded."""
    group, micro = config.contrastive_group, config.batch_of(replicas).micro_batch_sequences
    sources = Sources(config.data)
    tokenizers = config.tokenizers.build(sources.manifests, sources.storage.read)
    sources.check(tokenizers)
    limits = config.data.limits(config.training.seed)
    planned = sources.planned("train", limits, tokenizers)
    mixture = sources.mixture(tokenizers, config.training.budget_positions)
    planner = Planner(planned, mixture, limits, config.data.window_documents)
    batches = [[planner.next_sequence() for _ in range(config.batch.sequences)] for _ in range(steps)]
    sequences = [sequence for batch in batches for sequence in batch]
    parts = np.concatenate([sequence.parts for sequence in sequences])
    positions = sum(sequence.counts.positions for sequence in sequences)
    length = config.data.sequence_length

    table = Table("source", "share", "planned", "document parts", "positions", "epochs", title_justify="left")
    for column in range(1, 6):
        table.columns[column].justify = "right"
    targets = np.mean([mixture.shares(s.number * length) for s in sequences], axis=0)
    for source, target in zip(planned, targets.tolist(), strict=True):
        mine = parts[parts["source"] == source.number]
        served, begun = int(mine["length"].sum()), int((mine["part"] == 0).sum())
        table.add_row(
            source.name,
            f"{served / positions:.2%}",
            f"{target:.2%}",
            f"{len(mine):,}",
            f"{served:,}",
            f"{begun / source.rows:.2f}",
        )
    console.print(table)
    console.print(
        f"fill {positions / (len(sequences) * length):.4f} of {len(sequences):,} sequences of {length:,} positions"
    )
    costs = [np.array([s.counts.cost for s in batch], np.float64) for batch in batches]
    if replicas > 1:
        work = [c[deal(c, group, micro, replicas)].sum(1) for c in costs]
        worst = np.mean([w.max() / w.mean() for w in work])
        console.print(f"attention work of the busiest of {replicas} replicas: {worst:.3f} times the mean")
    lost = planner.lost
    console.print("nothing was cut or dropped" if not lost else "cut or dropped, up to the end of the last window:")
    for reason, number in sorted(lost.items()):
        console.print(f"  {reason}: {number:,}")


def si(number: float) -> str:
    """A count with a thousand's letter: 2.5T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
