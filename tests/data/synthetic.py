"""Small random prepared sources of every document kind, written through the real shard writer."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from mmoe.data.index.extent import Extent
from mmoe.data.index.shards import ShardWriter
from mmoe.schema.manifest import FORMAT, SourceManifest, SplitEntry
from mmoe.schema.modality import Modality
from mmoe.schema.sample import SEGMENT_DTYPE, Camera, Sample, Segment
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.audio import AudioConfig, MelCodec, MelConfig
from mmoe.tokenizers.text import TextTokenizer

RATE = 4000
MEL = MelConfig(sample_rate=RATE, window=128, hop=40, mels=8, stack=4, codebook_size=8)
STATS = {
    "ACTION": VectorStats(names=("steer", "gas"), mean=(0, 0), std=(1, 1), q01=(-1, -1), q99=(1, 1), period_ns=10**8),
    "STATE": VectorStats(names=("speed",), mean=(0,), std=(1,), q01=(-1,), q99=(1,)),
    "INERTIAL": VectorStats(names=("ax", "gz"), mean=(0, 0), std=(1, 1), q01=(-1, -1), q99=(1, 1)),
}


def png(rng: np.random.Generator, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def flac(rng: np.random.Generator, samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, rng.uniform(-0.3, 0.3, samples), RATE, format="FLAC")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32))
    return buffer.getvalue()


def words(rng: np.random.Generator, low: int = 1, high: int = 12) -> str:
    return " ".join("".join(rng.choice(list("abcdeü"), rng.integers(1, 5))) for _ in range(rng.integers(low, high)))


def text_sample(rng: np.random.Generator, key: str, low: int = 1, high: int = 12) -> Sample:
    text = words(rng, low, high)
    return Sample(key, key, {"txt": text.encode()}, [Segment(Modality.TEXT, "txt", text=text)])


def image_sample(rng: np.random.Generator, key: str) -> Sample:
    height, width = int(rng.integers(8, 40)), int(rng.integers(8, 40))
    text = words(rng)
    segments = [
        Segment(Modality.VISION, "png", 0, 1, height=height, width=width, pair=0),
        Segment(Modality.TEXT, "txt", pair=0, text=text),
    ]
    return Sample(key, key, {"png": png(rng, height, width), "txt": text.encode()}, segments)


def audio_sample(rng: np.random.Generator, key: str) -> Sample:
    samples, text = int(rng.integers(200, 3000)), words(rng, 1, 3)
    segments = [
        Segment(Modality.AUDIO, "flac", 0, samples, rate=RATE, pair=0),
        Segment(Modality.TEXT, "txt", pair=0, text=text),
    ]
    return Sample(key, key, {"flac": flac(rng, samples), "txt": text.encode()}, segments)


def clip_sample(rng: np.random.Generator, key: str, slices: int | None = None) -> Sample:
    """A clip whose slices differ in cameras, audio, text and action, as recordings with gaps do."""
    slices = slices or int(rng.integers(1, 5))
    members, segments, texts = {}, [], []
    members["flac"] = flac(rng, 800 * slices)
    members["actions.npy"] = npy(rng.uniform(-1, 1, (slices + 3, 2)))
    members["state.npy"], members["imu.npy"] = (
        npy(rng.normal(size=(slices, 1))),
        npy(rng.normal(size=(slices, 2))),
    )
    for number in range(slices):
        common = {"slice": number, "timestamp_ns": 500_000_000 * number}
        cameras = [c for c in Camera if rng.random() < 0.6] or [Camera.FRONT]
        has_text = rng.random() < 0.8
        pair = {"pair": number} if has_text else {}
        for camera in cameras:
            name = f"{camera.name.lower()}_{number}.png"
            members[name] = png(rng, 16, 24)
            geometry = {
                "height": 16,
                "width": 24,
                "camera": camera,
                "offset_ns": -int(rng.integers(0, 10**7)),
            }
            segments.append(Segment(Modality.VISION, name, 0, 1, **geometry, **common, **pair))
        if rng.random() < 0.6:
            segments.append(Segment(Modality.AUDIO, "flac", 800 * number, 800 * number + 500, rate=RATE, **common))
        if rng.random() < 0.7:
            segments.append(Segment(Modality.INERTIAL, "imu.npy", 0, number + 1, **common))
            segments.append(Segment(Modality.STATE, "state.npy", number, number + 1, **common))
        if rng.random() < 0.8:
            segments.append(Segment(Modality.ACTION, "actions.npy", number, slices + 3, **common))
        if has_text:
            texts.append(words(rng))
            segments.append(Segment(Modality.TEXT, "captions.json", text=texts[-1], **common, **pair))
    members["captions.json"] = json.dumps(texts).encode()
    return Sample(key, key, members, segments)


def button_sample(rng: np.random.Generator, key: str) -> Sample:
    """A clip whose second action is which of the `BUTTONS` is pressed."""
    sample = clip_sample(rng, key)
    table = np.load(io.BytesIO(sample.members["actions.npy"]))
    table[:, 1] = np.digitize(table[:, 1], (-0.5, 0.2))
    sample.members["actions.npy"] = npy(table)
    return sample


BUTTONS = {"gas": {"none": 5, "A": 7, "B": 8}}
MAKERS = {"text": text_sample, "image": image_sample, "audio": audio_sample, "clip": clip_sample}


def write_source(
    folder: Path,
    splits: dict[str, list[Sample]],
    rows_per_shard: int = 7,
    categories: dict[str, dict[str, int]] | None = None,
) -> SourceManifest:
    """Write samples as a prepared source with byte-level text."""
    tokenizer = TextTokenizer.bytes()
    entries = {}
    for split, samples in splits.items():
        extent = Extent()
        with ShardWriter(folder / split, max_rows=rows_per_shard) as writer:
            for sample in samples:
                extent.add(write_sample(writer, sample, tokenizer))
        entries[split] = SplitEntry(
            samples=len(samples),
            recordings=len({sample.recording for sample in samples}),
            shards=tuple(writer.shards),
            clips=extent.clips,
            slices=extent.slices,
            groups=extent.groups(),
        )
    present = {group.modality for entry in entries.values() for group in entry.groups}
    manifest = SourceManifest(
        format=FORMAT,
        kind="synthetic",
        text_fingerprint=tokenizer.fingerprint,
        clock="synthetic",
        skew_budget_ns=0,
        vectors={name: stats for name, stats in STATS.items() if name in present},
        categories=categories or {},
        splits=entries,
        quarantined={},
    )
    manifest.save(folder)
    return manifest


def write_sample(writer: ShardWriter, sample: Sample, tokenizer: TextTokenizer) -> np.ndarray:
    """Writes the sample and returns its index segments."""
    names = list(sample.members)
    rows, text = np.zeros(len(sample.segments), SEGMENT_DTYPE), []
    for row, segment in zip(rows, sample.segments, strict=True):
        for name in ("modality", "slice", "camera", "timestamp_ns", "offset_ns", "start", "stop"):
            row[name] = getattr(segment, name)
        for name in ("height", "width", "rate", "pair"):
            row[name] = getattr(segment, name)
        row["member"] = names.index(segment.member)
        if segment.modality is Modality.TEXT:
            ids = tokenizer.encode(segment.text)
            row["start"], row["stop"] = len(text), len(text) + len(ids)
            row["text_hash"] = hash(segment.text) >> 1
            text += ids.tolist()
    ids = np.array(text, np.int32)
    writer.write(sample.key, sample.members, recording=sample.recording, content_hash=0, text_ids=ids, segments=rows)
    return rows


def fit_codec(path: Path, seed: int = 0) -> AudioConfig:
    """A tiny fitted codec and the config that names it."""
    rng = np.random.default_rng(0)
    config = AudioConfig(path=str(path), codebooks=2, mel=MEL)
    waves = [rng.uniform(-0.3, 0.3, 4000).astype(np.float32) for _ in range(4)]
    MelCodec.fit(waves, config, seed=seed).save(path)
    return config


def write_sources(root: Path) -> None:
    """One source of every maker in `root`, 24 training and 6 held-out samples each, and their codec."""
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        samples = {s: [make(rng, f"{name}-{s[0]}{i}") for i in range(n)] for s, n in (("train", 24), ("heldout", 6))}
        write_source(root / name, samples)
    fit_codec(root / "codec.safetensors")
