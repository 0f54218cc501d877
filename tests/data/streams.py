"""A stream over small synthetic sources of every kind, for tests."""

from pathlib import Path

import numpy as np
import torch

from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.load.stream import Stream
from mmoe.data.plan.prepared import PreparedSources
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality
from mmoe.tokenizers.actions import ActionConfig
from mmoe.tokenizers.bundle import Tokenizers, TokenizersConfig
from mmoe.tokenizers.vision import VisionConfig
from tests.data.synthetic import MAKERS, fit_codec, text_sample, write_source

LENGTH = 160
WEIGHTS = np.ones(len(Modality), np.float32)


def write_folders(root: Path) -> Path:
    """One prepared source of each kind in `root`, and an audio codec."""
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        train = [make(rng, f"{name}-{i}") for i in range(30)]
        heldout = [make(rng, f"{name}-h{i}") for i in range(8)]
        if name == "text":
            train.append(text_sample(rng, "long", 200, 220))
        write_source(root / name, {"train": train, "heldout": heldout})
    fit_codec(root / "codec.safetensors")
    return root


def setup(
    folders: Path, *, discrete: bool = False, share: float = 0.5, names: tuple[str, ...] = tuple(MAKERS), **data
) -> tuple[DataConfig, PreparedSources, Tokenizers]:
    given = {"sequence_length": LENGTH, "window_documents": 40, "isolated_pair_share": share} | data
    config = DataConfig(
        sources={name: SourceConfig(kind="text", shards=str(folders / name)) for name in names}, **given
    )
    sources = PreparedSources(config)
    tokenizers = TokenizersConfig(
        vision=VisionConfig(patch=8, max_patches=12),
        audio=fit_codec(folders / "codec.safetensors"),
        action=ActionConfig(mode="discrete", chunk=4, bins=16) if discrete else ActionConfig(chunk=4),
    ).build(sources.manifests)
    return config, sources, tokenizers


def stream(
    folders: Path, *, replica: int = 0, replicas: int = 1, sequences: int = 4, group: int = 2, **choices
) -> Stream:
    quarantine = choices.pop("quarantine", None)
    micro = choices.pop("micro", 2)
    config, sources, tokenizers = setup(folders, **choices)
    return Stream(
        config,
        sources,
        tokenizers,
        seed=3,
        end=10**6,
        sequences=sequences,
        micro_sequences=micro,
        group_sequences=group,
        label_weights=WEIGHTS,
        replica=replica,
        replicas=replicas,
        quarantine=quarantine,
    )


def take(stream: Stream, steps: int) -> list:
    """(batches, counts, state) of each step."""
    out = []
    for _, data in zip(range(steps), stream.steps()):
        batches = list(data.batches)
        stream.quarantine.settle(lambda counts: counts)
        out.append((batches, data.counts, stream.state(data)))
    return out


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    others = ("values", "targets", "pairs", "documents", "quarantined", "reads")
    names = [n for n in a.__dataclass_fields__ if n not in others]
    same = all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.documents == b.documents
    same &= all(torch.equal(getattr(a.pairs, n), getattr(b.pairs, n)) for n in ("span", "modality", "group"))
    return same and all(
        torch.equal(a.values[k].values, b.values[k].values) and torch.equal(a.values[k].index, b.values[k].index)
        for k in a.values
    )


def rows(batches: list[PackedBatch]) -> set[tuple]:
    """Every sequence of the batches as bytes: what it holds, whoever decoded it and in which micro-batch."""
    found = set()
    for batch in batches:
        for b in range(batch.shape[0]):
            fields = (batch.token_ids, batch.labels, batch.position, batch.document, batch.offset_ns, batch.loss_weight)
            first, last = b * batch.shape[1], (b + 1) * batch.shape[1]
            vectors = []
            for kind, values in sorted(batch.values.items()):
                here = (values.index >= first) & (values.index < last)
                vectors.append(
                    (int(kind), (values.index[here] - first).numpy().tobytes(), values.values[here].numpy().tobytes())
                )
            here = (batch.pairs.span[:, 0, 0] >= first) & (batch.pairs.span[:, 0, 0] < last)
            pairs = (batch.pairs.span[here] - first).numpy().tobytes(), batch.pairs.group[here].numpy().tobytes()
            found.add((*(f[b].numpy().tobytes() for f in fields), *vectors, *pairs, str(batch.documents[b])))
    return found
