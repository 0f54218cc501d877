"""How much of bare decoding's speed the stream keeps: planning, reading, tokenizing, packing and handing over included.

    python benchmarks/data_pipeline.py [--rounds 3] [--sequences 24] [--cameras 2]

Both sides decode the same documents with two processes: one calls PyAV (or decord), soundfile and Pillow on their bytes
and throws the result away, at full size and as the stream calls them (videos scaled to their grid of patches, JPEGs by
their decoder to no less than twice that); the other is the stream with two workers as training uses it, by PyAV.
The share that is to be kept is of bare decoding by the backend in use, PyAV; decord's speeds stand beside it, bare and
of the stream.
"""

import argparse
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from rich.table import Table

from mmoe.commands.console import Console
from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_member
from mmoe.data.load.decode import SourceFiles
from mmoe.data.load.media import reduced_size
from mmoe.data.load.stream import Stream
from mmoe.data.load.video import VideoBackend, is_video
from mmoe.data.plan.mixture import StageConfig
from mmoe.data.plan.planner import SequencePlan
from mmoe.data.plan.prepared import PreparedSources
from mmoe.optional import status
from mmoe.preparation.prepare import prepare
from mmoe.result import print_result, target
from mmoe.schema.modality import Modality
from mmoe.tokenizers.audio import AudioConfig
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vision import VisionConfig

WORKERS = 2
CAMERAS = {"480 x 832": (480, 832, 20), "900 x 1600, as nuScenes": (900, 1600, 8)}  # pixels of a frame, recordings
PATCH = 16
IMAGES = 96  # of 768 x 1024 pixels


def write_images(folder: Path) -> None:
    """Smooth noise, so that a JPEG of it is as large as a photograph's."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((1024, 768), Image.BICUBIC), np.int16) + rng.integers(-12, 13, (768, 1024, 3))
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        lines.append(f'{{"image": "{number}.jpg", "caption": "image number {number}"}}\n')
    (folder / "captions.jsonl").write_text("".join(lines))


def build(root: Path, height: int, width: int, recordings: int) -> tuple[DataConfig, PreparedSources, TokenizersConfig]:
    text = TextTokenizer.bytes()
    write_images(root / "raw")
    options = {"recordings": recordings, "slices": [4, 4], "height": height, "width": width}
    options["prepare"] = {"heldout_share": 0.1}
    if status("decord").available:
        options["prepare"]["video_backend"] = "decord"  # proven to read the videos, or its stream would be padding
    prepare("simulated_drive", "-", root / "drive", text_tokenizer=text, workers=2, options=options)
    prepare("image_caption", root / "raw", root / "images", text_tokenizer=text, workers=2)
    config = DataConfig(
        sources={name: SourceConfig(kind="-", shards=str(root / name)) for name in ("drive", "images")},
        stages={"all": StageConfig(weights={"drive": 0.7, "images": 0.3})},
        sequence_length=4096,
        window_documents=256,
        workers=WORKERS,
    )
    audio = AudioConfig(path=str(root / "drive" / "audio_codec.safetensors"))
    return (
        config,
        PreparedSources(config),
        TokenizersConfig(vision=VisionConfig(patch=PATCH, max_patches=96), audio=audio),
    )


Grid = Callable[[int, int], tuple[int, int]] | None


def video_by_pyav(content: io.BytesIO, frames: np.ndarray, scaled: tuple[int, int] | None) -> None:
    """Decode from the first frame to the last of `frames`, and convert these; `scaled` is (height, width)."""
    wanted, converter = set(frames.tolist()), VideoReformatter()
    size = {} if scaled is None else {"height": scaled[0], "width": scaled[1], "interpolation": "AREA"}
    with av.open(content) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                converter.reformat(frame, format="rgb24", **size).to_ndarray()
            if number == max(wanted):
                return


def video_by_decord(content: io.BytesIO, frames: np.ndarray, scaled: tuple[int, int] | None) -> None:
    import decord  # Linux on x86-64 alone has it

    height, width = scaled or (-1, -1)
    decord.VideoReader(content, num_threads=1, width=width, height=height).get_batch(frames).asnumpy()


VIDEOS = {"pyav": video_by_pyav, "decord": video_by_decord}


def decode(tar: str, index: ShardIndex, part: np.void, grid: Grid, backend: str) -> None:
    """The payloads of a document part, opened by the libraries alone; scaled by them where a `grid` is given."""
    segments = index.row_segments(int(part["row"]))
    if (segments["slice"] >= 0).any():
        segments = segments[(segments["slice"] >= part["first"]) & (segments["slice"] < part["last"])]
    for member in np.unique(segments["member"]):
        name, offset, size = index.row_member(int(part["row"]), int(member))
        mine = segments[segments["member"] == member]
        kind, frame = mine["modality"][0], (int(mine["height"][0]), int(mine["width"][0]))
        if kind == Modality.VISION and grid is not None:
            least = tuple(PATCH * side for side in grid(*frame))
        if kind == Modality.TEXT:
            continue
        content = io.BytesIO(read_member(tar, offset, size, f"{index.keys[int(part['row'])]}.{name}"))
        if kind == Modality.VISION and is_video(name):
            VIDEOS[backend](content, mine["start"], None if grid is None else reduced_size(frame, least))
        elif kind == Modality.VISION:
            image = Image.open(content)
            if grid is not None:
                image.draft("RGB", (2 * least[1], 2 * least[0]))
            np.asarray(image)
        elif kind == Modality.AUDIO:
            wave_file = soundfile.SoundFile(content)
            for segment in mine:
                wave_file.seek(int(segment["start"]))
                wave_file.read(int(segment["stop"] - segment["start"]), dtype="float32")
        else:
            np.load(content)


def bare(plans: list[SequencePlan], files: list[SourceFiles], grid: Grid, backend: str, ready, go) -> None:
    """One process of bare decoding."""
    torch.set_num_threads(1)
    indices = {tar: ShardIndex.read(tar) for source in files for tar in source.tars}
    ready.release()
    go.wait()
    for plan in plans:
        for part in plan.parts:
            tar = files[part["source"]].tars[part["shard"]]
            decode(tar, indices[tar], part, grid, backend)


def time_bare(plans: list[SequencePlan], files: list[SourceFiles], grid: Grid, backend: str) -> float:
    context = multiprocessing.get_context("fork")
    ready, go = context.Semaphore(0), context.Event()
    given = [(plans[i::WORKERS], files, grid, backend, ready, go) for i in range(WORKERS)]
    processes = [context.Process(target=bare, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    started = time.perf_counter()
    go.set()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit("a process of bare decoding failed")
    return time.perf_counter() - started


def make_stream(config: DataConfig, sources: PreparedSources, tokenizers) -> Stream:
    return Stream(
        config,
        sources,
        tokenizers,
        seed=0,
        end=10**9,
        sequences=1,
        micro_sequences=1,
        group_sequences=1,
        label_weights=np.ones(len(Modality), np.float32),
    )


def time_stream(stream: Stream, sequences: int) -> tuple[float, int]:
    """Seconds and positions of so many sequences, after the workers have begun."""
    steps = stream.steps()
    for _ in range(2 * WORKERS * stream.config.prefetch):  # what the queues hold when the clock starts
        list(next(steps).batches)
    positions, started = 0, time.perf_counter()
    for _ in range(sequences):
        data = next(steps)
        if any(batch.quarantined for batch in data.batches):
            sys.exit("a document of the stream could not be decoded: nothing was measured")
        positions += data.counts.positions
    return time.perf_counter() - started, positions


def compare(camera: tuple[int, int, int], rounds: int, sequences: int) -> dict[str, list[float]]:
    """Positions a second of each, in turn, as the machine may be shared."""
    with tempfile.TemporaryDirectory() as folder:
        config, sources, settings = build(Path(folder), *camera)
        tokenizers = settings.build(sources.manifests)
        planner = make_stream(config, sources, tokenizers).planner
        plans = [planner.next_sequence() for _ in range(sequences)]
        positions, files = sum(plan.counts.positions for plan in plans), sources.files("train")
        backends: dict[str, VideoBackend] = {"": "pyav"} | ({"decord ": "decord"} if status("decord").available else {})
        rates = {}
        for _ in range(rounds):
            for label, backend in backends.items():
                for kind, grid in (("full size", None), ("same calls", tokenizers.vision.grid)):
                    seconds = time_bare(plans, files, grid, backend)
                    rates.setdefault(label + kind, []).append(positions / seconds)
                used = config.model_copy(update={"video_backend": "decord" if label else "auto"})
                seconds, served = time_stream(make_stream(used, sources, tokenizers), sequences)
                rates.setdefault(label + "stream", []).append(served / seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--cameras", type=int, default=len(CAMERAS), help="the first so many of the camera sizes")
    chosen = parser.parse_args()
    table = Table("camera", "what", "positions/s", title="medians, 2 processes", title_justify="left")
    figures, targets = {}, {}
    for name, camera in list(CAMERAS.items())[: chosen.cameras]:
        rates = figures[name] = compare(camera, chosen.rounds, chosen.sequences)
        for kind, values in rates.items():
            table.add_row(name, kind, f"{np.median(values):,.0f}")
        table.add_section()
        for kind in ("full size", "same calls"):
            share = float(np.median([s / b for s, b in zip(rates["stream"], rates[kind], strict=True)]))
            targets[f"share of bare decoding ({kind}), cameras {name}"] = target(share, 0.85)
    Console().print(table)
    print_result("data_pipeline", figures, targets)


if __name__ == "__main__":
    main()
