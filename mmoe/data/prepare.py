"""Preparation: raw recordings -> indexed WebDataset shards with held-out recordings, a manifest, a quarantine list.

`Source.items` lists what there is, `split` decides by recording, workers make and check the samples (`rows.py`),
and this process writes them in order, the held-out ones first, so that their duplicates can be left out of the
training part. Everything is written into a folder beside the output that takes its name when all is done.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.config.base import Config
from mmoe.config.load import validate
from mmoe.data.index import FORMAT, SPLITS, ShardIndex, SourceManifest, VectorStats
from mmoe.data.media import Backend, load_audio
from mmoe.data.pool import ordered_map
from mmoe.data.rows import Row, make_row
from mmoe.data.sample import Modality
from mmoe.data.shards import ShardWriter, read_member
from mmoe.data.sources import find_source
from mmoe.data.sources.base import Item, Quarantine, Refused, Source
from mmoe.data.splits import GAP_NS, Split, split
from mmoe.data.tally import QuarantineLog, Tally, summary
from mmoe.errors import DataError
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from mmoe.tokenizers.audio import AudioConfig, MelCodec, resample
from mmoe.tokenizers.text import TextTokenizer

QUARANTINE = "quarantine.jsonl"
AUDIO_CODEC = "audio_codec.safetensors"
AUDIO_REPORT = "audio_codec.json"


class PrepareConfig(Config):
    """What preparation decides for any source; given as ``prepare.<key>`` among the reader's options."""

    heldout_share: float = Field(0.15, ge=0, lt=1)  # of recordings, or of the length of each; 0: hold out nothing
    shard_bytes: int = Field(256 << 20, gt=0)
    shard_rows: int = Field(10_000, gt=0)
    video_backend: Backend = "decord"  # that checks the videos
    audio: AudioConfig = AudioConfig()  # the codec fitted to a source with sound, where its kind is mel
    audio_seed: int = Field(0, ge=0)


def prepare(
    kind: str,
    input: str | Path,
    output: str | Path,
    *,
    text_tokenizer: TextTokenizer,
    workers: int = 1,
    options: dict[str, Any] | None = None,
    console: Console | None = None,
) -> SourceManifest:
    """Prepare the recordings in `input` (of a kind in `SOURCES`) as the folder `output`.

    `options` are keys of the reader's config, and under ``prepare`` keys of `PrepareConfig`. The output is the same
    for any number of `workers`. Raises DataError when `output` exists, `input` does not, or a split is left without
    a sample; ConfigError for an unknown kind or option.
    """
    source, reader, config = _settings(kind, options)
    output, console = Path(output), console or Console()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} already exists; delete it to prepare it again, or name another folder")
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        quarantine = QuarantineLog(unfinished / QUARANTINE)
        sides = _split_items(source, Path(input), reader, config, quarantine)
        work = partial(
            make_row,
            tokenizer=text_tokenizer,
            video_backend=config.video_backend,
            vector_names=source.vector_names,
        )
        with closing(ordered_map(work, sides.heldout + sides.train, workers)) as rows:
            tallies = _write_splits(unfinished, sides, rows, config, quarantine, _progress(console))
        _check_filled(tallies, config, quarantine, input)
        vectors = sorted(tallies["train"].vectors.items())
        manifest = SourceManifest(
            format=FORMAT,
            kind=source.kind,
            text_fingerprint=text_tokenizer.fingerprint,
            clock=source.clock,
            skew_budget_ns=source.skew_budget_ns,
            vectors={modality.name: statistics(source, modality, tables) for modality, tables in vectors},
            splits={name: tallies[name].entry() for name in SPLITS},
            quarantined=dict(sorted(quarantine.counts.items())),
        )
        console.print(summary(kind, tallies, quarantine.counts))
        for modality, tables in vectors:
            if modality is Modality.ACTION:
                console.print(_round_trip(manifest.vectors[modality.name], np.concatenate(tables)))
        if tallies["train"].segments["AUDIO"] and config.audio.kind == "mel":
            _fit_audio_codec(unfinished, manifest, config, console)
        manifest.save(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def training_texts(kind: str, input: str | Path, options: dict[str, Any] | None = None) -> Iterator[str]:
    """Every text of the training part in order, to train a text tokenizer on; refused items are passed over."""
    source, reader, config = _settings(kind, options)
    for item in _split_items(source, Path(input), reader, config, lambda key, refusal: None).train:
        try:
            sample = item.make()
        except DataError:
            continue  # `prepare` counts it and says why
        yield from (segment.text for segment in sample.segments if segment.modality is Modality.TEXT)


def statistics(source: Source, modality: Modality, tables: list[np.ndarray]) -> VectorStats:
    """Per dimension over all rows of the tables [N, D], in float64."""
    rows = np.concatenate(tables).astype(np.float64)
    q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
    return VectorStats(
        names=source.vector_names[modality.name],
        mean=tuple(rows.mean(axis=0).tolist()),
        std=tuple(rows.std(axis=0).tolist()),
        q01=tuple(q01.tolist()),
        q99=tuple(q99.tolist()),
        period_ns=source.action_period_ns if modality is Modality.ACTION else 0,
    )


def _round_trip(stats: VectorStats, rows: np.ndarray) -> str:
    tokenizer = ActionTokenizer(ActionConfig(mode="discrete"), stats)
    errors = ", ".join(f"{name} {error:.2g}" for name, error in tokenizer.round_trip_error(rows).items())
    return f"actions: root mean square error of {tokenizer.config.bins} uniform bins: {errors}"


def _settings(kind: str, options: dict[str, Any] | None) -> tuple[Source, Config, PrepareConfig]:
    source, options = find_source(kind), dict(options or {})
    config = validate(PrepareConfig, options.pop("prepare", {}), f"options of {kind}, under prepare")
    return source, validate(source.config, options, f"options of {kind}"), config


def _split_items(source: Source, input: Path, reader: Config, config: PrepareConfig, quarantine: Quarantine) -> Split:
    """The items by side; what is refused without being made (a second sample of a key, the gap) is recorded."""
    if not source.generated and not input.exists():
        raise DataError(f"{input} does not exist; give the file or folder of the recordings to prepare")
    items: dict[str, Item] = {}
    for item in source.items(input, reader, quarantine):
        if item.key in items:
            message = f"sample key {item.key} occurs twice in {input}; give every recording its own name"
            quarantine(item.key, Refused("duplicate key", message))
        else:
            items[item.key] = item
    sides = split(list(items.values()), config.heldout_share, gap=0 if source.clock == "none" else GAP_NS)
    for item in sides.gap:
        message = f"sample {item.key} lies in the gap before the held-out tail of {item.recording}"
        quarantine(item.key, Refused("gap before the held-out tail", message))
    return sides


def _write_splits(
    folder: Path,
    sides: Split,
    rows: Iterator[Row | Refused],
    config: PrepareConfig,
    quarantine: Quarantine,
    progress: Progress,
) -> dict[str, Tally]:
    """Write `rows`, those of the held-out items first, and tell what each split then holds."""
    tallies = {name: Tally() for name in SPLITS}
    heldout = tallies["heldout"]
    with progress:
        task = progress.add_task("preparing", total=len(sides.heldout) + len(sides.train))
        for name, items in (("heldout", sides.heldout), ("train", sides.train)):
            with ShardWriter(folder / name, config.shard_bytes, config.shard_rows) as writer:
                for item, row in zip(items, rows):
                    if name == "train" and isinstance(row, Row) and row.content_hash in heldout.hashes:
                        message = f"sample {item.key} has the content of a held-out sample and was left out of train"
                        row = Refused("duplicate of a held-out sample", message)
                    if isinstance(row, Refused):
                        quarantine(item.key, row)
                    else:
                        row.write(writer)
                        tallies[name].add(row)
                    progress.advance(task)
            tallies[name].shards = writer.shards
    return tallies


def _check_filled(
    tallies: dict[str, Tally], config: PrepareConfig, quarantine: QuarantineLog, input: str | Path
) -> None:
    taken = {name: tally.samples for name, tally in tallies.items()}
    empty = "train" if not taken["train"] else "heldout" if config.heldout_share and not taken["heldout"] else None
    if empty is None:
        return
    refused = sum(quarantine.counts.values())
    if not refused:
        raise DataError(
            f"{input} gives no sample for the split {empty}; add recordings"
            + (", or set prepare.heldout_share=0" if empty == "heldout" else "")
        )
    raise DataError(
        f"{input} leaves no sample for the split {empty}: {refused} were refused, {sum(taken.values())} taken; "
        f"repair or add recordings. The first refusal: {quarantine.first}"
    )


def _fit_audio_codec(folder: Path, manifest: SourceManifest, config: PrepareConfig, console: Console) -> None:
    """Fit on the training sounds, save, and report the error on the held-out ones (on the former if none are)."""
    rate = config.audio.mel.sample_rate
    codec = MelCodec.fit(_waves(folder, manifest, "train", rate), config.audio, config.audio_seed)
    codec.save(folder / AUDIO_CODEC)
    measured = "heldout" if manifest.splits["heldout"].segments.get("AUDIO") else "train"
    errors = codec.reconstruction_error(_waves(folder, manifest, measured, rate))
    report = {"fingerprint": codec.fingerprint, "split": measured, "reconstruction_error": errors}
    (folder / AUDIO_REPORT).write_text(json.dumps(report, indent=1))
    levels = ", ".join(f"{error:.3f} with {level}" for level, error in errors.items())
    console.print(f"audio codec: mean squared error of the normalised log-mel bands ({measured}), by levels: {levels}")


def _waves(folder: Path, manifest: SourceManifest, name: str, rate: int) -> Iterable[np.ndarray]:
    """Every AUDIO segment of a split as mono f32 [n] at `rate` Hz."""
    for shard in manifest.splits[name].shards:
        index = ShardIndex.read(folder / shard.path)
        for row, key in enumerate(index.keys):
            for segment in index.row_segments(row):
                if segment["modality"] == Modality.AUDIO:
                    member, offset, size = index.row_member(row, int(segment["member"]))
                    where = f"{key}.{member}"
                    sound = read_member(index.tar, offset, size, where)
                    wave, found = load_audio(sound, int(segment["start"]), int(segment["stop"]), where)
                    yield resample(wave, found, rate).numpy()


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
