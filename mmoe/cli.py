"""The command line: `mmoe <command>`, or `python -m mmoe <command>`."""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.text import Text

from mmoe.addresses import without_secrets
from mmoe.commands.console import Console
from mmoe.errors import MmoeError

if TYPE_CHECKING:
    from mmoe.recipe.config import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Engine = Literal["processes", "ray"]  # as `mmoe.preparation.engines.Engine`, which would be slow to import here
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted overrides, e.g. optim.lr.peak=1e-3")]
Addresses = Annotated[list[str] | None, typer.Argument(help="moved data, e.g. data.sources.drive.shards=/new/place")]
# What the machine refuses, and no fault of the program: it ends in a sentence.
OUTSIDE = {
    errno.ENOSPC: "make room, or name another folder",
    errno.EDQUOT: "make room, or name another folder",
    errno.EFBIG: "name a folder on another disk",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "change its rights, or name another",
    errno.EPERM: "change its rights, or name another",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder",
    errno.EEXIST: "name another",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead in a circle: name another",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}
INTERRUPTED = 130  # as shells give it for Ctrl-C


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(help="reader, e.g. text, donkeycar, nuscenes; see docs/guide.md")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="file or folder of raw recordings; - for a simulation")
    ],
    output: Annotated[Path, typer.Argument(help="folder of the prepared source")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, e.g. recordings=100")] = None,
    text_tokenizer: Annotated[str | None, typer.Option(help="tokenizer JSON; without it, plain bytes")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; the output is the same for any number; default: what pays")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="ray: on a Ray cluster (RAY_ADDRESS), or a local one")] = "processes",
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: delete what a broken-off call did")] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="leave out near duplicates too; equal ones always")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="a prepared source whose samples are not to occur again; repeatable")
    ] = None,
) -> None:
    """Raw recordings -> indexed WebDataset shards with held-out recordings.

    An interrupted call keeps what it has finished; the same command goes on from there.
    """
    from mmoe.config.load import merge, parse_overrides
    from mmoe.data.storage.store import DEFAULT
    from mmoe.preparation.prepare import prepare as run
    from mmoe.tokenizers.text import TextConfig

    tokenizer = TextConfig(path=text_tokenizer).build(DEFAULT.read)
    duplicates = {"near": True} if dedup else {}
    duplicates |= {"against": against} if against else {}
    run(
        kind,
        source,
        output,
        text_tokenizer=tokenizer,
        workers=workers,
        engine=engine,
        fresh=fresh,
        options=merge(parse_overrides(options or []), {"prepare": {"dedup": duplicates}} if duplicates else {}),
    )


@app.command()
def fit_tokenizer(
    kind: Annotated[str, typer.Argument(help="reader, as in prepare")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="folder or file of raw recordings")],
    output: Annotated[Path, typer.Argument(metavar="FILE", help="the tokenizer's JSON")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, e.g. recordings=100")] = None,
    vocabulary_size: Annotated[int, typer.Option(min=257, help="ids, the 256 bytes among them")] = 4096,
) -> None:
    """Train a byte-level BPE on the training texts of a source."""
    from mmoe.config.load import parse_overrides
    from mmoe.preparation.prepare import training_texts
    from mmoe.tokenizers.text import TextTokenizer

    tokenizer = TextTokenizer.train(training_texts(kind, source, parse_overrides(options or [])), vocabulary_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    console.print(f"{output}: {tokenizer.size} ids, fingerprint {tokenizer.fingerprint[:12]}")


DRY_RUN = ("world_size", "rank", "imbalance", "documents", "vocabulary")  # options of `train` for --dry-run alone


def _given(context: typer.Context, name: str) -> bool:
    """Whether the command line has the option, be it with its default."""
    return context.get_parameter_source(name).name == "COMMANDLINE"


def _config(path: Path, overrides: list[str] | None) -> "RunConfig":
    """Read the config in a YAML file, or that of the run whose folder is given; with overrides applied."""
    from mmoe.config.load import load, override
    from mmoe.recipe.config import RunConfig
    from mmoe.training.run import is_run, read_config

    return override(read_config(path), overrides or []) if is_run(path) else load(RunConfig, path, overrides)


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/demo.yaml, or a run's folder to resume")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: delete what the run's folder holds")] = False,
    stop_after: Annotated[int | None, typer.Option(help="end this session after that many steps in all")] = None,
    from_step: Annotated[int | None, typer.Option(help="resume from the checkpoint of this step")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="cost a step of --world-size ranks, without data")] = False,
    world_size: Annotated[int, typer.Option(min=1, help="ranks of a dry run")] = 1,
    rank: Annotated[list[int] | None, typer.Option(help="of a dry run; repeatable; default: one a stage")] = None,
    imbalance: Annotated[float, typer.Option(help="of a dry run: the busiest rank of ep over the mean")] = 1.0,
    documents: Annotated[int, typer.Option(min=1, help="of a dry run: documents that fill a sequence")] = 1,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="of a dry run: ids; default: the tokenizer's, or 2^17")
    ] = None,
) -> None:
    """Train a run, or resume it where its folder already holds checkpoints. What is missing is prepared first.

    With --dry-run nothing is trained: parameters, memory, collectives and operations of ranks that need not exist.
    """
    from mmoe.errors import ConfigError

    others = ("fresh", "stop_after", "from_step") if dry_run else DRY_RUN
    if ignored := [f"--{name.replace('_', '-')}" for name in others if _given(context, name)]:
        verb = "is" if len(ignored) == 1 else "are"
        kind = "training, not for --dry-run" if dry_run else "--dry-run, which was not given"
        raise ConfigError(f"{', '.join(ignored)} {verb} for {kind}; drop one or the other")
    if dry_run:
        from mmoe.planning.dry_run_report import Plan, show_dry_run

        plan = Plan.of(_config(config, overrides), world_size, imbalance, documents, vocabulary)
        show_dry_run(plan, rank or [], console)
        return
    from mmoe.commands.train import train as run

    run(_config(config, overrides), console, fresh=fresh, stop_after=stop_after, from_step=from_step)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    shards: Annotated[str | None, typer.Option(help="another prepared source instead of the run's own")] = None,
    blank: Annotated[str | None, typer.Option(help="modality whose payload is zeroed: vision, audio, ...")] = None,
    shuffle: Annotated[str | None, typer.Option(help="modality taken from another held-out recording")] = None,
) -> None:
    """Measure a run on its held-out recordings."""
    from mmoe.evaluation.evaluate import evaluate as run
    from mmoe.evaluation.evaluate import show
    from mmoe.schema.sample import Modality
    from mmoe.training.run import Run

    def modality(name: str | None) -> Modality | None:
        if name is None:
            return None
        if name.upper() not in Modality.__members__:
            raise MmoeError(f"{name!r} is not a modality; choose from {', '.join(m.name.lower() for m in Modality)}")
        return Modality[name.upper()]

    blanked, shuffled = modality(blank), modality(shuffle)
    show(run(Run.load(folder, overrides=overrides or ()), shards=shards, blank=blanked, shuffle=shuffled), console)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    prompt: Annotated[str, typer.Option(help="text to continue, or context of the sound")] = "",
    image: Annotated[Path | None, typer.Option(help="a picture that stands before the text")] = None,
    audio: Annotated[Path | None, typer.Option(help="a sound that stands before the text")] = None,
    speak: Annotated[Path | None, typer.Option(help="write a sampled sound to this wav instead of text")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="longest sound")] = 2.0,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="share of probability to draw from")] = 1.0,
    seed: int = 0,
) -> None:
    """Sample text, or a sound, from a trained run."""
    from mmoe.evaluation.generate import Sampling
    from mmoe.evaluation.generate import generate as text
    from mmoe.evaluation.generate import speak as sound
    from mmoe.training.run import Run

    run = Run.load(folder, overrides=overrides or ())
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if speak is not None:
        length = sound(run, speak, prompt=prompt, seconds=seconds, sampling=sampling)
        console.print(f"wrote {length:.2f} s of sound to {speak}")
        return
    answer = text(run, prompt, image=image, audio=audio, max_tokens=max_tokens, sampling=sampling)
    console.print(prompt + answer, highlight=False)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN")], overrides: Addresses = None) -> None:
    """Write summary.json and report.html of a run from what its folder holds."""
    from mmoe.optional import needs

    with needs("the report"):
        from mmoe.reporting.report import write_report
    from mmoe.training.run import Run

    write_report(Run.load(folder, overrides=overrides or ()))
    console.print(f"wrote {folder / 'report.html'}")


@app.command()
def stages(config: Annotated[Path, typer.Argument(help="a YAML file")], overrides: Overrides = None) -> None:
    """What each stage will take from each source: shares, positions, epochs, before anything runs."""
    from mmoe.planning.data import show_stages

    show_stages(_config(config, overrides), console)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Addresses = None,
    *,
    out: Annotated[Path, typer.Option(help="folder to write; an earlier export in it is replaced")],
    format: Annotated[Literal["hf"], typer.Option(help="hf: Hugging Face config.json and safetensors")] = "hf",
    step: Annotated[int | None, typer.Option(help="checkpoint to export; default: the latest")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="of the weights; default: as trained")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="largest size of one file of weights")] = 5_000_000_000,
) -> None:
    """Write the text path of a run as a Llama, Qwen3, Mixtral or Qwen3-MoE that transformers loads."""
    import torch

    from mmoe.interchange.export import export as run
    from mmoe.training.run import Run

    kind = None if dtype is None else getattr(torch, dtype)
    run(Run.load(folder, step, overrides or ()), out, console, dtype=kind, shard_bytes=shard_bytes)


@app.command()
def upcycle(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="a dense run, or a folder of dense Hugging Face weights")
    ],
    config: Annotated[Path, typer.Argument(help="YAML of the new run: the same model with model.moe")],
    overrides: Overrides = None,
    noise: Annotated[float, typer.Option(min=0, help="on the copies: its std over that of the dense matrix")] = 0.0,
    step: Annotated[int | None, typer.Option(help="checkpoint of RUN; default: the latest")] = None,
) -> None:
    """Make experts of a dense model's networks: the new run's checkpoint of step 0, and what it costs in loss."""
    from mmoe.interchange.upcycle import upcycle as run
    from mmoe.recipe.training import StartConfig

    run(_config(config, overrides), StartConfig(weights=str(folder), step=step, noise=noise), console)


@app.command()
def inspect(
    config: Annotated[Path, typer.Argument(help="a YAML file, its sources prepared")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps to plan")] = 20,
    replicas: Annotated[int, typer.Option(min=1, help="data replicas to deal to")] = 1,
) -> None:
    """Plan a run's first steps without decoding: shares, fill, everything cut or dropped, balance of work."""
    from mmoe.planning.data import inspect as run

    run(_config(config, overrides), steps, replicas, console)


@app.command()
def sync_report(
    path: Annotated[str, typer.Argument(help="prepared source, or raw recordings with --kind")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, with --kind")] = None,
    kind: Annotated[str | None, typer.Option(help="reader of raw recordings, as in prepare")] = None,
    html: Annotated[Path, typer.Option(help="page with the histograms")] = Path("sync-report.html"),
) -> None:
    """Rates, jitter, gaps and offsets of every stream's clock, as a table and an HTML page."""
    from mmoe.config.load import parse_overrides
    from mmoe.errors import ConfigError
    from mmoe.files import write_atomically, writes
    from mmoe.optional import needs
    from mmoe.preparation import sync_report as clocks

    with needs("the page"):
        from mmoe.reporting.sync_page import render

    if kind is None and options:
        raise ConfigError(f"options {' '.join(options)} are for a reader of raw recordings; add --kind, or drop them")
    report = (
        clocks.report_raw(kind, Path(path), parse_overrides(options or [])) if kind else clocks.report_prepared(path)
    )
    if report.kind == "synthetic":
        console.print(clocks.SYNTHETIC, style="bold")
    console.print(clocks.table(report))
    with writes(html):
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, render(report))
    console.print(f"wrote {html}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """What this machine has: versions, cores, memory, GPU, and every optional backend."""
    from mmoe.commands.doctor import report as show

    show(console)


def main() -> None:
    """Run the command line; what a user or the machine is the cause of is printed as one sentence.

    Faults of the program keep their traceback.
    """
    try:
        app()
    except MmoeError as error:
        _fail(without_secrets(str(error)))
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        what = f"{names}: " if names else ""
        _fail(f"{what}{os.strerror(error.errno)}; {OUTSIDE[error.errno]}")
    except KeyboardInterrupt:  # before a command has begun
        _fail("interrupted", INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted", INTERRUPTED)
        raise


def _fail(message: str, status: int = 1) -> NoReturn:
    """Say the sentence and end; what stdout still holds is dropped where it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    Console(stderr=True).print(Text("error", "bold red"), message, highlight=False, soft_wrap=True)
    sys.exit(status)
