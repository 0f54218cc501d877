"""Shows held-out slices as pictures in a page: every camera of an instant, and what was said of it."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.data.load.video import Backend, is_video
from mmoe.data.storage.store import Storage
from mmoe.optional import needs
from mmoe.reporting.page import parts
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig
from mmoe.training.run import Run

# As one stands in the standard rig: the row in front, the row behind.
AROUND = ("front_left", "front", "front_right", "back_left", "back", "back_right")
WIDEST = 480  # pixels of a picture in the page
_LOSSLESS_PIXELS = 1 << 14


@dataclass(frozen=True)
class SlicePictures:
    """Holds what a slice shows: `pictures` uint8 [H, W, 3] by camera number in `rig`, and its `caption`.

    A camera number of -1 says that there is no camera.
    """

    pictures: dict[int, np.ndarray]
    caption: str
    rig: Rig = STANDARD


def read_slice(run: Run, source: str, shard: int, row: int, chunk: int) -> SlicePictures:
    """Read the slice of a held-out row that its action chunk number `chunk` belongs to."""
    files = next(files for files in run.sources.files("heldout") if files.name == source)
    index = ShardIndex.read(files.tars[shard], run.sources.storage)
    segments = index.row_segments(row)
    number = segments["slice"][np.flatnonzero(segments["modality"] == Modality.ACTION)[chunk]]
    pictures: dict[int, np.ndarray] = {}
    caption = ""
    for segment in segments[segments["slice"] == number]:
        if segment["modality"] == Modality.VISION:
            pictures.setdefault(
                int(segment["camera"]),
                _picture(run.sources.storage, index, row, segment, run.config.data.video_backend),
            )
        elif segment["modality"] == Modality.TEXT:
            caption = run.tokenizers.text.decode(index.row_text(row)[segment["start"] : segment["stop"]])
    return SlicePictures(pictures, caption, run.sources.manifests[source].rig)


def slice_card(item: dict[str, Any], names: list[str], found: SlicePictures) -> Markup:
    """Render one slice as HTML: its pictures as the rig sees them, its caption, its action as logged and predicted."""
    shown: list[tuple[str, np.ndarray | None]] = [("", picture) for picture in found.pictures.values()]
    if len(found.pictures) > 1:
        cameras = AROUND if found.rig == STANDARD else found.rig.cameras
        shown = [(name.replace("_", " "), found.pictures.get(found.rig.number(name))) for name in cameras]
    pictures = [(name, None if picture is None else data_uri(picture)) for name, picture in shown]
    actions = zip(names, zip(*item["true"]), zip(*item["predicted"]))
    kind = "rig" if len(found.pictures) > 1 else "single"
    return parts.slice(kind, pictures, found.caption, len(item["true"]), actions, item["recording"])


def data_uri(picture: np.ndarray) -> str:
    """Encode a picture uint8 [H, W, 3] as a data URI.

    It is PNG where it is small, else JPEG of at most `WIDEST` pixels width.
    """
    with needs("pictures in the report"):
        from PIL import Image
    image = Image.fromarray(picture)
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    kind = "png" if image.width * image.height <= _LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(storage: Storage, index: ShardIndex, row: int, segment: np.void, backend: Backend) -> np.ndarray:
    member = int(segment["member"])
    stored = read_stored(index, row, member, storage)
    with needs("pictures in the report"):
        from mmoe.data.load.frames import stored_frames
        from mmoe.data.load.media import load_image
    if is_video(stored.name):
        frames = stored_frames(stored.content, backend, stored.where, index.row_decord(row, member))
        return frames.frames(np.array([segment["start"]]))[0]
    return load_image(stored.content, stored.where)
