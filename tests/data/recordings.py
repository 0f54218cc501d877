"""Small raw recordings, made by libraries that the readers under test do not use for reading where possible."""

import io
import json
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

MILLISECOND = Fraction(1, 1000)
ONE, WHOLE = 1 << 16, 1 << 30
# The display matrix of an mp4 track (ISO 14496-12) for clockwise quarter turns.
MATRICES = {
    0: (ONE, 0, 0, 0, ONE, 0, 0, 0, WHOLE),
    90: (0, ONE, 0, -ONE, 0, 0, 0, 0, WHOLE),
    180: (-ONE, 0, 0, 0, -ONE, 0, 0, 0, WHOLE),
    270: (0, -ONE, 0, ONE, 0, 0, 0, 0, WHOLE),
}


def png(pixels: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    """16-bit WAV of integer samples [n] or [n, channels], by the standard library."""
    samples = samples.reshape(len(samples), -1).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def npy(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def images(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """[count, height, width, 3] uint8, each unlike its neighbors and without any symmetry."""
    row, column = np.mgrid[:height, :width]
    frames = [np.stack([row * 3 + 7 * i, column * 2 + 5 * i, row + column + 40 * (i % 3)], -1) for i in range(count)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def video(
    frames: np.ndarray, *, container: str = "mp4", codec: str = "libx264", times_ms: list[int] | None = None, **options
) -> bytes:
    """Frames [n, H, W, 3] shown at `times_ms` (25 a second without it)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times_ms:
            stream.codec_context.time_base = MILLISECOND
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times_ms[number] if times_ms else number
            frame.time_base = MILLISECOND if times_ms else Fraction(1, 25)
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return buffer.getvalue()


def turned(mp4: bytes, dims: int) -> bytes:
    """The mp4 with its rotation tag set: the display matrix of the track header is overwritten."""
    at = mp4.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0 header up to the matrix
    return mp4[:at] + struct.pack(">9i", *MATRICES[dims]) + mp4[at + 36 :]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_captions(folder: Path, count: int) -> None:
    for i in range(count):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"p{i}.png").write_bytes(png(images(i + 1)[i]))
    write_jsonl(
        folder / "captions.jsonl", [{"image": f"images/p{i}.png", "caption": f"Bild {i}"} for i in range(count)]
    )


def write_audio(folder: Path, takes: int = 3, speakers: tuple[str, ...] = ("ada", "bob")) -> None:
    """A second of tone per word, speaker and take; every audio differs."""
    rows = []
    for number, (take, speaker, word) in enumerate(
        (take, speaker, word) for take in range(takes) for speaker in speakers for word in ("one", "two")
    ):
        tone = np.sin(np.arange(8000) * 0.03 * (number + 2)) + 0.2 * np.sin(
            np.arange(8000) * 0.0007 * (number + 3) ** 2
        )
        name = f"{word}_{speaker}_{take}.wav"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(wav(tone * 8000))
        rows.append({"audio": name, "text": word, "speaker": speaker, "take": take, "samples": 8000})
    write_jsonl(folder / "transcripts.jsonl", rows)


def write_tub(folder: Path, records: list[dict], deleted: list[int] = ()) -> None:
    """A donkeycar tub v2 of `records` (an "_index", an angle, a throttle each); an image for every record."""
    (folder / "images").mkdir(parents=True)
    manifest = [
        ["cam/image_array", "user/angle", "user/throttle"],
        ["image_array", "float", "float"],
        {},
        {"created_at": 0.0},
        {"paths": ["catalog_0.catalog"], "current_index": len(records), "deleted_indexes": list(deleted)},
    ]
    (folder / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    rows = []
    for record in records:
        name = f"{record['_index']}_cam_image_array_.jpg"
        buffer = io.BytesIO()
        Image.fromarray(images(record["_index"] % 7 + 1)[-1]).save(buffer, "JPEG", quality=60)
        (folder / "images" / name).write_bytes(buffer.getvalue() + b"%d" % record["_index"])  # unlike all others
        rows.append({"_timestamp_ms": 1000, "cam/image_array": name, **record})
    write_jsonl(folder / "catalog_0.catalog", rows)


def drive_records(count: int) -> list[dict]:
    return [
        {"_index": i, "user/angle": float(np.sin(i / 9)), "user/throttle": 0.5 + 0.01 * (i % 5)} for i in range(count)
    ]
