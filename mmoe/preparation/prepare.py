"""Prepares raw recordings as indexed WebDataset shards with held-out recordings, a manifest, and lists of the rest.

`Source.items` lists what there is, and `split_items` decides by recording. Runs of items (`chunks.py`) are then made,
checked, filtered and written by whatever engine runs them (`engines.py`). From the hashes they leave behind, this
process decides in order what is a duplicate (`duplicates.py`); the chunks that hold one are written again without it.
Last, the shards are numbered and the counts added up. All this happens in a folder beside the output (`job.py`) that
keeps what is finished when the process dies, and becomes the output when all is done.
"""

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pydantic import Field, model_validator

from mmoe.addresses import check_address
from mmoe.config.base import Config
from mmoe.config.load import validate
from mmoe.data.load.reading import reading
from mmoe.data.storage.store import DEFAULT_STORAGE
from mmoe.errors import DataError
from mmoe.optional import require
from mmoe.preparation.audio_codec import fit_audio_codec
from mmoe.preparation.chunks import (
    Chunk,
    ChunkConfig,
    ChunkDuplicates,
    ChunkMaker,
    DuplicateRemover,
    StoredChunk,
    cut_chunks,
)
from mmoe.preparation.duplicates import Duplicates
from mmoe.preparation.engines import Engine, run
from mmoe.preparation.job import JOB_FORMAT, Job, listing_digest, names_digest
from mmoe.preparation.listing import can_split, check_listed, check_named, list_items, read_listed, split_items
from mmoe.preparation.lists import (
    QUARANTINE,
    REMOVED,
    Refusals,
    Removed,
    beside,
    keep_lists,
    refusals,
    unfilled,
    with_list,
    write_lists,
)
from mmoe.preparation.references import Reference, ReferenceSigner, find_references, is_signed, load_signatures
from mmoe.preparation.rows import Row, make_sample
from mmoe.preparation.source_report import SplitReport, Summary, summary
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Item, Source
from mmoe.preparation.splits import HeldoutBy, Holdout
from mmoe.preparation.vectors import category_counts, round_trip, vector_stats
from mmoe.schema.bounds import bounded_by
from mmoe.schema.channels import CANCELLED, CANCELLED_OUT
from mmoe.schema.manifest import FORMAT, SPLITS, ShardEntry, SourceManifest
from mmoe.schema.modality import Modality
from mmoe.tokenizers.audio import AudioConfig
from mmoe.tokenizers.text import TextTokenizer

logger = logging.getLogger(__name__)

# Given what is done, how many items of how many (None: unknown), gives what is told of every further ones.
PrepareProgress = Callable[[str, int, int | None], AbstractContextManager[Callable[[int], None]]]

SYNTHETIC = "clock: synthetic, made from a row's number and a rate; it cannot show skew between sensors"

_REMOTE = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/")
_PROBES = 8  # items made to learn how large and how slow they are
_CHUNKS, _SMALLEST_CHUNK = 16, 32  # a small source has as many chunks as give that many items each
_FILL = 0.8  # of `shard_bytes` that a chunk is meant to fill: where items vary, few chunks then need a second shard
_WORTH_SECONDS = 4.0  # of work, for which a process more is started


class PrepareConfig(ChunkConfig):
    """Says what preparation decides for any source; given as ``prepare.<key>`` among the reader's options."""

    # Of recordings, or of the length of each; 0: hold out nothing, 1: all, as an official test side.
    heldout_share: float = Field(0.15, ge=0, le=1)
    heldout_by: HeldoutBy = "recordings"  # size: the share is that of all bytes, rows, seconds or (no extent) samples
    heldout_list: str | None = None  # a file with a key or a recording a line, which says instead what is held out
    audio: AudioConfig = AudioConfig()  # the codec fitted to a source with audio, where its kind is mel
    audio_seed: int = Field(0, ge=0)  # of that fit

    @model_validator(mode="after")
    def _one_way(self) -> "PrepareConfig":
        if self.heldout_list is not None and self.model_fields_set & {"heldout_share", "heldout_by"}:
            raise ValueError("heldout_list says what is held out; leave out heldout_share and heldout_by")
        return self

    def holdout(self) -> Holdout:
        """Return what is to be held out. Raises DataError for a list that cannot be read."""
        listed = None if self.heldout_list is None else read_listed(Path(self.heldout_list))
        return Holdout(self.heldout_share, self.heldout_by, listed)

    def chunks(self) -> ChunkConfig:
        """Return the part of the config by which chunks are made."""
        return ChunkConfig(**{name: getattr(self, name) for name in ChunkConfig.model_fields})


@dataclass(frozen=True)
class Prepared:
    """Holds the manifest of a source that `prepare` has made, and what there is to say of it."""

    manifest: SourceManifest
    summary: Summary


def _unseen(said: str, done: int, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda count: None)


def prepare(
    kind: str,
    input: str | Path,
    output: str | Path,
    *,
    text_tokenizer: TextTokenizer,
    workers: int | None = 1,
    engine: Engine = "processes",
    fresh: bool = False,
    options: dict[str, Any] | None = None,
    progress: PrepareProgress = _unseen,
) -> Prepared:
    """Prepare the recordings in `input` (of a kind in `SOURCES`) as the folder `output`.

    `options` are keys of the reader's config, and under ``prepare`` keys of `PrepareConfig`. The output is the same
    for any number of `workers` (None: as many as the work is worth) and on any `engine`. What an interrupted call has
    finished is kept for the same call again; `fresh` deletes it instead. `progress` is told of the items.

    Raises DataError when `output` exists, `input` does not, another preparation of `output` is unfinished, or a split
    is left without a sample; ConfigError for an unknown kind or option.
    """
    source, reader, config = _settings(kind, options)
    check_named(input)
    config.filters.check()
    config.dedup.check()
    holdout = config.holdout()
    if config.video_backend == "decord":
        require("decord", "prepare.video_backend")
    for address in (input, output):
        check_address(str(address))
    if _REMOTE.match(str(output)):
        raise DataError(f"{output} is no local folder; prepare into one, and copy it to the store when it is complete")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} already exists; delete it to prepare it again, or name another folder")
    listed: Refusals = []
    beside(output, QUARANTINE).unlink(missing_ok=True)  # of an attempt before, and no input of this one
    beside(output, REMOVED).unlink(missing_ok=True)
    with bounded_by(config.bounds):
        try:
            items = list_items(source, Path(input), reader, lambda key, why: listed.append((key, why.reason, str(why))))
            split_items(source, items, [], holdout)
            strange = check_listed(holdout, items, Path(config.heldout_list or ""), Path(input))
        except DataError as error:
            raise with_list(error, listed, output) from error
        with reading("source", str(input), "repair its description"):
            source = source.described(Path(input), reader)
    references = find_references(config.dedup, text_tokenizer)
    with bounded_by(config.bounds), Job(output) as job:
        if fresh:
            job.restart()
        pins = {
            "format": JOB_FORMAT,
            "kind": kind,
            "options": reader.model_dump(mode="json") | {"prepare": config.model_dump(mode="json")},
            "text tokenizer": text_tokenizer.fingerprint,
            "input": listing_digest(items, None if source.generated else Path(input), (job.folder, output)),
            "against": {source: _digest(source) for source in config.dedup.against},
            "held-out list": None if holdout.listed is None else names_digest(holdout.listed),
        }
        resumed = job.pin(pins)
        rate = config.audio.mel.sample_rate if config.audio.kind == "mel" else None
        names = source.vector_names
        make = ChunkMaker(job.folder / "chunks", config.chunks(), text_tokenizer, names, rate, source.categories)

        def work(task: Callable, todo: Sequence, done: int, total: int, said: str) -> None:
            assert workers is not None  # decided before there is work
            _work(task, todo, workers, engine, progress(said, done, total))

        lost: Refusals = job.remember("lost", list)
        while True:
            sides, gap = split_items(source, items, lost, holdout)
            plan = job.remember("plan", partial(_plan, make, sides.heldout + sides.train))
            sized = [(side, getattr(sides, side), plan["chunk"]) for side in ("heldout", "train")]
            chunks = [chunk for given in sized for chunk in cut_chunks(*given)]
            if workers is None:
                workers = max(1, min(len(os.sched_getaffinity(0)), int(plan["seconds"] / _WORTH_SECONDS)))
            _make_chunks(job, make, chunks, work, resumed)
            sign = ReferenceSigner(job.folder / "references", config.dedup, text_tokenizer)
            _sign_references(job, sign, references, work)
            removed = _find_duplicates(job, chunks, references, config)
            remove = DuplicateRemover(make.folder, job.folder / "thinned", make.config)
            folders = _remove_duplicates(job, remove, chunks, removed, work)
            reports, shards = _assemble(job, folders)
            refused, left_out = write_lists(job.result, [*listed, *lost, *gap], folders, removed)
            problem = unfilled(reports, holdout, refused, left_out, input, output)
            if problem is None:
                break
            again = [*lost, *refusals(folders)]
            if reports["train"].samples and len(again) > len(lost) and can_split(source, items, again, holdout):
                job.begin_again("lost", again)  # what was held out cannot be read: others are held out instead
                lost = again
                continue
            keep_lists(job.result, output, refused, left_out)
            job.discard()  # what is repaired is to be read again
            raise problem
        measured = reports["heldout" if holdout.everything else "train"]
        manifest = SourceManifest(
            format=FORMAT,
            kind=source.kind,
            text_fingerprint=text_tokenizer.fingerprint,
            clock=source.clock,
            skew_budget_ns=reader.skew.budget_ns if hasattr(reader, "skew") else source.skew_budget_ns,
            rig=source.rig,
            vectors=vector_stats(source, measured, reports["heldout"]),
            categories=category_counts(source, measured),
            splits={name: reports[name].entry(shards[name]) for name in SPLITS},
            quarantined=dict(sorted(refused.counts.items())),
            removed=dict(sorted(left_out.counts.items())),
        )
        said = summary(kind, reports, refused.counts, left_out.counts, manifest.vectors)
        said.notes.extend([*strange, *source.notes])
        if cancelled := sum(report.flags[flag] for report in reports.values() for flag in (CANCELLED, CANCELLED_OUT)):
            said.notes.append(
                f"audio: {cancelled:,} clips are silent, since their channels cancel out when they are mixed; "
                "prepare.audio_channel=left (or right, or a number from 0) takes one of them"
            )
        if source.clock == "synthetic":
            said.notes.append(SYNTHETIC)
        if Modality.ACTION in reports["train"].vectors:
            rows = reports["train"].vectors[Modality.ACTION].sample()
            said.notes.append(round_trip(manifest, rows))
        if reports["train"].extent.segments(Modality.AUDIO) and config.audio.kind == "mel":
            said.notes.append(fit_audio_codec(job.result, manifest, config.audio, config.audio_seed))
        manifest.save(job.result)
        job.finish()
    return Prepared(manifest, said)


def training_texts(kind: str, input: str | Path, options: dict[str, Any] | None = None) -> Iterator[str]:
    """Yield every text of the training part in order, to train a text tokenizer on; refused items are passed over.

    `options` are those of `prepare`.
    """
    source, reader, config = _settings(kind, options)
    check_named(input)
    holdout = config.holdout()
    with bounded_by(config.bounds):
        items = list_items(source, Path(input), reader, lambda key, refusal: None)
        items = split_items(source, items, [], holdout)[0].train
    for item in items:
        try:
            with bounded_by(config.bounds):
                sample = make_sample(item)
        except DataError:
            continue  # `prepare` counts it and says why
        yield from (segment.text for segment in sample.segments if segment.modality is Modality.TEXT)


def _settings(kind: str, options: dict[str, Any] | None) -> tuple[Source, Config, PrepareConfig]:
    source, options = SOURCES.find(kind), dict(options or {})
    config = validate(PrepareConfig, options.pop("prepare", {}), f"options of {kind}, under prepare")
    return source, validate(source.config, options, f"options of {kind}"), config


def _digest(prepared: str) -> str:
    return hashlib.sha256(SourceManifest.load(prepared, DEFAULT_STORAGE.read).model_dump_json().encode()).hexdigest()


def _plan(make: ChunkMaker, items: Sequence[Item]) -> dict[str, Any]:
    """Items a chunk, and about how many seconds one process needs for all, from a few items all over the source."""
    rows, seconds = [], []
    for item in items[:: max(1, len(items) // _PROBES)][:_PROBES]:
        begun = time.perf_counter()
        row = make.row(item)
        seconds.append(time.perf_counter() - begun)
        rows += [row] if isinstance(row, Row) else []
    chunk = min(make.config.shard_rows, max(_SMALLEST_CHUNK, math.ceil(len(items) / _CHUNKS)))
    size = fmean(sum(map(len, row.sample.members.values())) for row in rows) if rows else 0
    if chunk * size > make.config.shard_bytes:
        chunk = max(1, int(_FILL * make.config.shard_bytes / size))
    return {"chunk": chunk, "seconds": round(median(seconds) * len(items), 1) if items else 0.0}


def _work(
    task: Callable,
    todo: Sequence,
    workers: int,
    engine: Engine,
    seen: AbstractContextManager[Callable[[int], None]],
) -> None:
    if not todo:
        return
    with seen as advance, closing(run(task, todo, workers, engine)) as counts:
        for count in counts:
            advance(count)


def _make_chunks(job: Job, make: ChunkMaker, chunks: list[Chunk], work: Callable, resumed: bool) -> None:
    make.folder.mkdir(exist_ok=True)
    todo = [] if job.assembling else [chunk for chunk in chunks if not StoredChunk(make.folder / chunk.name).whole()]
    total = sum(len(chunk.items) for chunk in chunks)
    done = total - sum(len(chunk.items) for chunk in todo)
    if resumed:
        logger.info(f"going on: {done:,} of {total:,} items are done (--fresh starts over)")
    work(make, todo, done, total, "preparing")


def _sign_references(job: Job, sign: ReferenceSigner, references: list[Reference], work: Callable) -> None:
    sign.folder.mkdir(exist_ok=True)
    todo = [reference for reference in references if not is_signed(sign.folder, reference)]
    work(sign, todo, 0, None, "reading other sources")


def _find_duplicates(
    job: Job, chunks: list[Chunk], references: list[Reference], config: PrepareConfig
) -> dict[str, Removed]:
    """By name of the chunk, what is to be left out of it."""
    duplicates = Duplicates(config.dedup)
    removed: dict[str, Removed] = {}
    for reference in references:
        duplicates.reference(reference.side, *load_signatures(job.folder / "references", reference))
    for chunk in chunks:
        signatures = StoredChunk(job.folder / "chunks" / chunk.name).signatures()
        items = [chunk.items[number] for number in signatures.item.tolist()]
        keys, recordings = [item.key for item in items], [item.recording for item in items]
        for found in duplicates.judge(chunk.side, signatures, keys, recordings):
            message = f"sample {keys[found.row]} is a {found.reason}, {found.of}"
            line = int(signatures.item[found.row]), found.reason, message, found.of
            removed.setdefault(chunk.name, []).append(line)
    return removed


def _remove_duplicates(
    job: Job, remove: DuplicateRemover, chunks: list[Chunk], removed: dict[str, Removed], work: Callable
) -> dict[Chunk, Path]:
    """Write the chunks with duplicates again; returns where each chunk now is."""
    remove.folder.mkdir(exist_ok=True)
    found = [ChunkDuplicates(name, frozenset(line[0] for line in lines)) for name, lines in removed.items()]
    todo = [] if job.assembling else [chunk for chunk in found if not StoredChunk(remove.folder / chunk.name).whole()]
    work(remove, todo, 0, sum(len(chunk.items) for chunk in todo), "leaving out duplicates")
    return {c: (remove.folder if c.name in removed else remove.source) / c.name for c in chunks}


def _assemble(job: Job, folders: dict[Chunk, Path]) -> tuple[dict[str, SplitReport], dict[str, list[ShardEntry]]]:
    """Number the shards through and add up the counts; can be broken off anywhere and done again."""
    job.begin_assembly()
    reports = {name: SplitReport() for name in SPLITS}
    shards: dict[str, list[ShardEntry]] = {name: [] for name in SPLITS}
    for name in SPLITS:
        (job.result / name).mkdir(parents=True, exist_ok=True)
    for chunk, folder in folders.items():
        stored, entries = StoredChunk(folder), shards[chunk.side]
        reports[chunk.side].merge(stored.report())
        for shard in stored.shards:
            path = f"{chunk.side}/shard-{len(entries):06d}.tar"
            for suffix in (".parquet", ".tar"):
                here, there = (folder / shard.path).with_suffix(suffix), (job.result / path).with_suffix(suffix)
                if not there.exists():
                    here.rename(there)
            entries.append(shard.model_copy(update={"path": path}))
    return reports, shards
