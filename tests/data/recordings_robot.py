"""Robot episodes as BridgeData (unpacked) and LeRobot v3.0 lay them out."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.recordings import images, video, write_jsonl

LEVEL = 7  # grey levels between two rows of an image


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def level_images(first: int, count: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Images [count, H, W, 3] u8 whose mean tells their number modulo 32."""
    levels = (np.arange(first, first + count) % 32) * LEVEL + 10
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def write_bridge(folder: Path, episodes: list[dict]) -> None:
    """`episodes` have steps and cameras, optionally a text; states are squares of the step, actions differences."""
    rows = []
    for number, episode in enumerate(episodes):
        name, steps = f"ep{number:02d}", episode["steps"]
        (folder / name).mkdir(parents=True)
        state = (np.arange(steps)[:, None] ** 2 + 100 * number + np.arange(7) / 10).astype(np.float32)
        action = np.diff(state, axis=0, append=state[-1:] + 1)
        np.savez(folder / name / "steps.npz", state=state, action=action, is_first=np.arange(steps) == 0)
        for camera in episode["cameras"]:
            for step in range(steps):
                image = images(step % 5 + 1, 32, 48)[-1] ^ np.uint8(camera * 16 + number)
                (folder / name / f"image_{camera}_{step:02d}.jpg").write_bytes(jpeg(image))
        text = episode.get("text", f"task {number}")
        rows.append({"episode": name, "steps": steps, "cameras": episode["cameras"], "language_instruction": text})
    write_jsonl(folder / "episodes.jsonl", rows)


def write_lerobot(
    folder: Path,
    lengths: list[int],
    *,
    fps: int = 10,
    cameras: tuple[str, ...] = ("observation.images.top",),
    stored: tuple[str, ...] = (),
    version: str = "v3.0",
    names: object = ("x", "y", "grip"),
    times_ms: list[int] | None = None,
    files: int = 1,
    encoding: dict | None = None,
) -> None:
    """A dataset v3.0: episode e's row i has state (e, i, 0.5), action (e, i + 1, 0.25), image number e * 8 + i.

    `cameras` are videos, episodes end to end; `stored` are images inside parquet. `files` data and video files.
    """
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": names},
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "grip"]}},
        **{key: {"dtype": "video", "shape": [32, 64, 3], "names": ["height", "width", "c"]} for key in cameras},
        **{key: {"dtype": "image", "shape": [32, 64, 3], "names": None} for key in stored},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("index", "task_index")},
    }
    info = {
        "codebase_version": version,
        "fps": fps,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": ["lift the cube", "drop the cube"]})
    pq.write_table(tasks, folder / "meta/tasks.parquet")
    entries, index = [], 0
    groups = np.array_split(np.arange(len(lengths)), files)
    for file, group in enumerate(groups):
        rows, seen, at = [], [], 0
        for e in group.tolist():
            length = lengths[e]
            entry = {
                "episode_index": e,
                "tasks": [["lift the cube", "drop the cube"][e % 2]],
                "length": length,
                "dataset_from_index": index,
                "dataset_to_index": index + length,
                "data/chunk_index": 0,
                "data/file_index": file,
            }
            for key in cameras:
                place = {"chunk_index": 0, "file_index": file, "from_timestamp": at / fps}
                place["to_timestamp"] = (at + length) / fps
                entry |= {f"videos/{key}/{name}": value for name, value in place.items()}
            entries.append(entry)
            shown = level_images(e * 8, length)
            seen.append(shown)
            for i in range(length):
                row = {
                    "observation.state": [float(e), float(i), 0.5],
                    "action": [float(e), i + 1.0, 0.25],
                    "timestamp": np.float32(i / fps),
                    "frame_index": i,
                    "episode_index": e,
                    "index": index + i,
                    "task_index": e % 2,
                }
                rows.append(row | {key: {"bytes": jpeg(shown[i]), "path": f"{i}.jpg"} for key in stored})
            index, at = index + length, at + length
        data = folder / f"data/chunk-000/file-{file:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        vector = pa.list_(pa.float32())
        for key in ("observation.state", "action"):
            table = table.set_column(table.column_names.index(key), key, table[key].cast(vector))
        at_time = table.column_names.index("timestamp")
        pq.write_table(table.set_column(at_time, "timestamp", table["timestamp"].cast(pa.float32())), data)
        for number, key in enumerate(cameras):
            path = folder / f"videos/{key}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            times = times_ms or [round(1000 * i / fps) for i in range(at)]
            path.write_bytes(
                video(np.concatenate(seen) + np.uint8(2 * number), times_ms=times, **(encoding or {"crf": 1, "g": 6}))
            )
    pq.write_table(pa.Table.from_pylist(entries), folder / "meta/episodes/chunk-000/file-000.parquet")
