"""How full sequences get, how fast a plan is made, and how evenly its work is dealt.

    python benchmarks/data_packing.py

The plan runs on synthetic shard indices (no tar is opened): 60 % of the positions log-normal text (median 400 tokens,
sigma 1.2), 20 % image-text (300 +- 80), 20 % clips of 20 slices of 606 positions, seed 0.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.table import Table

from mmoe.commands.console import Console
from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.index.extent import Extent
from mmoe.data.index.file import write_table
from mmoe.data.index.shard_index import DIGEST, INDEX_SCHEMA
from mmoe.data.plan.assignment import assign_to_replicas
from mmoe.data.plan.blocks import FITS
from mmoe.data.plan.mixture import StageConfig
from mmoe.data.plan.packing import best_fit
from mmoe.data.plan.planner import Planner
from mmoe.data.plan.prepared import PreparedSources
from mmoe.result import print_result, target
from mmoe.schema.counts import PATCHES
from mmoe.schema.manifest import FORMAT, ShardEntry, SourceManifest, SplitEntry
from mmoe.schema.modality import Modality
from mmoe.schema.sample import SEGMENT_DTYPE, Camera
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.bundle import Tokenizers, TokenizersConfig
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vision import VisionConfig

SHARES = {"text": 0.6, "image_text": 0.2, "clips": 0.2}
DISTINCT = 8  # shards of a source that differ; the others are links to them
DIGESTED = "of the benchmark"  # in place of the digest of an index, which no one asks for here
SLICES, CAMERA_PIXELS = (
    20,
    (128, 192),
)  # 96 patches a camera; with caption, readings and structure 606 positions a slice
CAPTION = 17
STATS = {
    name: VectorStats(names=("a", "b"), mean=(0, 0), std=(1, 1), q01=(-1, -1), q99=(1, 1), period_ns=10**8)
    for name in ("ACTION", "STATE", "INERTIAL")
}


def text_rows(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and their number by row."""
    segments = np.zeros(rows, SEGMENT_DTYPE)
    segments["modality"], segments["slice"], segments["camera"], segments["pair"] = Modality.TEXT, -1, -1, -1
    segments["stop"] = np.maximum(1, rng.lognormal(np.log(400), 1.2, rows)).astype(np.int64) - 2
    segments["stop"] = np.maximum(segments["stop"], 1)
    return segments, np.ones(rows, np.int64)


def image_text_rows(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Four fifths of the positions are patches, the rest is the caption."""
    length = np.clip(rng.normal(300, 80, rows), 64, 1024).astype(np.int64)
    columns = length * 4 // 5 // 8
    segments = np.zeros((rows, 2), SEGMENT_DTYPE)
    segments["slice"], segments["camera"] = -1, -1
    segments["modality"] = Modality.VISION, Modality.TEXT
    segments[:, 0]["height"], segments[:, 0]["width"], segments[:, 0]["stop"] = 128, 16 * columns, 1
    segments[:, 1]["stop"] = length - 8 * columns - 4
    return segments.reshape(-1), np.full(rows, 2)


def clip_rows(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    kinds = [Modality.VISION] * len(Camera) + [Modality.INERTIAL, Modality.STATE, Modality.ACTION, Modality.TEXT]
    segments = np.zeros((rows, SLICES, len(kinds)), SEGMENT_DTYPE)
    segments["modality"], segments["camera"], segments["pair"] = kinds, -1, -1
    segments["slice"] = segments["pair"] = np.arange(SLICES)[:, None]
    segments[:, :, : len(Camera)]["camera"] = np.arange(len(Camera))
    segments[:, :, : len(Camera)]["height"], segments[:, :, : len(Camera)]["width"] = CAMERA_PIXELS
    segments["stop"] = 1
    segments[:, :, -1]["stop"] = CAPTION
    return segments.reshape(-1), np.full(rows, SLICES * len(kinds))


def write_source(folder: Path, make, shards: int, rows: int) -> None:
    """A prepared source of `shards` indices of `rows` rows, without tars."""
    (folder / "train").mkdir(parents=True)
    schema = INDEX_SCHEMA.with_metadata({DIGEST: DIGESTED})
    rng, extent, written = np.random.default_rng(0), Extent(), []
    for number in range(min(DISTINCT, shards)):
        segments, counts = make(rng, rows)
        struct = pa.StructArray.from_arrays(
            [pa.array(np.ascontiguousarray(segments[name])) for name in SEGMENT_DTYPE.names],
            fields=list(INDEX_SCHEMA.field("segments").type.value_type),
        )
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        columns = {
            "key": [f"{i:06d}" for i in range(rows)],
            "recording": ["r"] * rows,
            "content_hash": np.zeros(rows, np.int64),
            "members": [[]] * rows,
            "text_ids": [[]] * rows,
            "segments": pa.ListArray.from_arrays(offsets, struct),
        }
        written.append(folder / "train" / f"shard-{number:06d}.parquet")
        write_table(pa.table(columns, schema=schema), written[-1])
        if number == 0:
            for row in np.split(segments, np.cumsum(counts)[:-1]):
                extent.add(row)
    for number in range(len(written), shards):
        os.link(written[number % DISTINCT], folder / "train" / f"shard-{number:06d}.parquet")
    groups = tuple(
        group.model_copy(update={"count": group.count * shards, "span": group.span * shards})
        for group in extent.groups()
    )
    entry = SplitEntry(
        samples=shards * rows,
        recordings=1,
        shards=tuple(
            ShardEntry(path=f"train/shard-{i:06d}.tar", rows=rows, bytes=0, digest=DIGESTED) for i in range(shards)
        ),
        clips=extent.clips * shards,
        slices=extent.slices * shards,
        groups=groups,
    )
    present = {group.modality for group in groups}
    SourceManifest(
        format=FORMAT,
        kind="synthetic",
        text_fingerprint=TextTokenizer.bytes().fingerprint,
        clock="none",
        skew_budget_ns=0,
        vectors={name: stats for name, stats in STATS.items() if name in present},
        splits={"train": entry},
        quarantined={},
    ).save(folder)


def write_mixture(root: Path, text: tuple[int, int], image_text: tuple[int, int], clips: tuple[int, int]) -> None:
    """(shards, rows a shard) by source."""
    for name, make, (shards, rows) in (
        ("text", text_rows, text),
        ("image_text", image_text_rows, image_text),
        ("clips", clip_rows, clips),
    ):
        write_source(root / name, make, shards, rows)


def build(root: Path, length: int, state: dict | None = None) -> tuple[Planner, Tokenizers]:
    config = DataConfig(
        sources={name: SourceConfig(kind="synthetic", shards=str(root / name)) for name in SHARES},
        stages={"all": StageConfig(weights=SHARES)},
        sequence_length=length,
        patches_per_sequence=length * 7 // 8,
    )
    sources = PreparedSources(config)
    tokenizers = TokenizersConfig(vision=VisionConfig(patch=16, max_patches=1024)).build(sources.manifests)
    limits = config.limits(seed=0)
    planned = sources.planned("train", limits, tokenizers)
    planner = Planner(planned, sources.mixture(tokenizers, 10**12), limits, config.window_documents)
    if state is not None:
        planner.restore(state)
    return planner, tokenizers


def documents(planner: Planner) -> int:
    """Drawn up to the end of the window that the next sequence comes from."""
    return sum((planner._after or planner._state).drawn)


def efficiency(root: Path, length: int) -> dict[str, float]:
    """Packing efficiency over 40 windows, and the documents that were cut although they fit."""
    planner, _ = build(root, length)
    sequences = []
    while planner.state["window"] < 40:
        sequences.append(planner.next_sequence())
    wrong = 0
    for source in planner.sources:
        for block in source._blocks.values():
            patches = np.add.reduceat(block.counts[:, PATCHES], block.offsets[:-1])
            fits = (block.lengths <= length) & (patches <= length * 7 // 8)
            wrong += int((fits & (block.fate != FITS)).sum())
    positions = sum(s.counts.positions for s in sequences)
    served = np.array(planner.state["served"], float)
    return {
        "packing_efficiency": positions / (len(sequences) * length),
        "cut_though_fitting": wrong,
        "share_error": float(np.abs(served / served.sum() - list(SHARES.values())).max()),
    }


def cpu_seconds(function, *arguments) -> float:
    """Of one core: what else runs on the machine counts less than in seconds of the wall clock."""
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started


def packer() -> dict[str, dict[str, float]]:
    """Documents a second of the packer alone, in one window; the best of three."""
    rng, capacity = np.random.default_rng(0), 8192
    found = {}
    for name, make in (
        ("log_normal", lambda n: np.clip(rng.lognormal(np.log(400), 1.2, n), 3, capacity).astype(np.int64)),
        ("clips", lambda n: rng.integers(1, capacity // 606 + 1, n) * 606 + 4),
    ):
        seconds = {}
        for number in (100_000, 400_000):
            lengths = make(number)
            patches = np.zeros_like(lengths)
            seconds[number] = min(cpu_seconds(best_fit, lengths, patches, capacity, capacity) for _ in range(3))
        found[name] = {
            "documents_per_second": 400_000 / seconds[400_000],
            "time_ratio_400k_100k": seconds[400_000] / seconds[100_000],
        }
    return found


def plan_speed(root: Path, sequences: int = 512) -> dict[str, float]:
    """Milliseconds of CPU time per 1000 documents of order, mixture, packing and dealing, blocks read on the way."""
    planner, _ = build(root, 8192)
    planner.next_sequence()
    began = documents(planner)

    def steps() -> None:
        for _ in range(24):
            step = [planner.next_sequence() for _ in range(sequences)]
            assign_to_replicas(np.array([s.counts.cost for s in step]), 1, 8, 64)

    seconds = cpu_seconds(steps)
    drawn = documents(planner) - began
    return {"ms_per_1000_documents": seconds * 1e6 / drawn, "documents": drawn}


def imbalance(root: Path, replicas: int = 64, steps: int = 24) -> dict[str, float]:
    """Attention work of the busiest of `replicas` over the mean, 8 sequences each, dealt at random and as a snake."""
    planner, _ = build(root, 8192)
    rng, ratios = np.random.default_rng(0), {"random": [], "snake": []}
    for _ in range(steps):
        costs = np.array([float(planner.next_sequence().counts.cost) for _ in range(8 * replicas)])
        for name, dealt in (
            ("random", rng.permutation(len(costs)).reshape(replicas, -1)),
            ("snake", assign_to_replicas(costs, 1, 8, replicas)),
        ):
            work = costs[dealt].sum(axis=1)
            ratios[name].append(work.max() / work.mean())
    return {name: float(np.mean(values)) for name, values in ratios.items()}


def start(root: Path, state: str) -> None:
    """In a process of its own: from manifests to the first plan, or to that of a restored state."""
    before = peak_mib()
    started = time.perf_counter()
    planner, _ = build(root, 8192, json.loads(state) or None)
    planner.next_sequence()
    seconds = time.perf_counter() - started
    after = peak_mib()
    print(json.dumps({"seconds": seconds, "mib": after - before, "mib_process": after}))


def peak_mib() -> float:
    """Of this process since it was started; `ru_maxrss` would still know its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def started_apart(root: Path, state: dict | None) -> dict[str, float]:
    command = [sys.executable, __file__, "start", str(root), json.dumps(state)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small, large = root / "small", root / "large"
        write_mixture(small, text=(32, 5000), image_text=(32, 5000), clips=(32, 100))
        packing = {length: efficiency(small, length) for length in (4096, 8192)}
        packed, dealt = packer(), imbalance(small)
        speed = min((plan_speed(small) for _ in range(3)), key=lambda found: found["ms_per_1000_documents"])
        write_mixture(large, text=(1000, 7000), image_text=(900, 3300), clips=(100, 300))
        first = started_apart(large, None)
        planner, _ = build(large, 8192)
        rows = np.array([source.rows for source in planner.sources])
        planner.next_sequence()
        after = planner._after
        windows = 10**6 * 512 // after.sequences  # the counters as they stand after a million steps of 512 sequences
        state = {
            "window": windows,
            "next_sequence": after.sequences // 2,
            "sequences": after.sequences * windows,
            "drawn": [n * windows for n in after.drawn],
            "served": [n * windows for n in after.served],
            "deficit": after.deficit,
            "lost": {},
        }
        restored = started_apart(large, state)
    figures = {
        "packing": packing,
        "packer": packed,
        "plan": speed,
        "imbalance_64": dealt,
        "start": first | {"documents": int(rows.sum()), "shards": 2000},
        "restore": restored,
    }
    targets = {
        **{f"packing efficiency at {n}": target(f["packing_efficiency"], 0.995) for n, f in packing.items()},
        **{f"cut though fitting at {n}": target(f["cut_though_fitting"], 0, at_most=True) for n, f in packing.items()},
        **{f"packer {k}: documents/s": target(v["documents_per_second"], 400_000) for k, v in packed.items()},
        **{
            f"packer {k}: time of 400k / 100k": target(v["time_ratio_400k_100k"], 5.0, at_most=True)
            for k, v in packing.items()
        },
        "plan: ms per 1000 documents": target(speed["ms_per_1000_documents"], 3.0, at_most=True),
        "start to first plan: s": target(first["seconds"], 3.0, at_most=True),
        "start to first plan: MiB": target(first["mib"], 300.0, at_most=True),
        "restore step 1e6: s": target(restored["seconds"], 2.0, at_most=True),
        "snake excess / random excess": target((dealt["snake"] - 1) / (dealt["random"] - 1), 0.5, at_most=True),
    }
    table = Table("what", "value", "target", "", title="packing and planning", title_justify="left")
    for name, row in targets.items():
        table.add_row(name, f"{row['value']:,.4g}", f"{row['target']:,.4g}", "ok" if row["ok"] else "MISSED")
    Console().print(table)
    print_result("data_packing", figures, targets)


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
