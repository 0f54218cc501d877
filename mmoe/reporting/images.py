"""Shows held-out slices as images in a page: every camera of an instant, and what was said of it."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.data.load.video import VideoBackend, is_video
from mmoe.data.storage.store import Storage
from mmoe.optional import needs
from mmoe.reporting.page import parts
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig
from mmoe.training.run import RunView

# As one stands in the standard rig: the row in front, the row behind.
AROUND = ("front_left", "front", "front_right", "back_left", "back", "back_right")
MAX_IMAGE_WIDTH = 480  # pixels of an image in the page
_LOSSLESS_PIXELS = 1 << 14


@dataclass(frozen=True)
class SliceImages:
    """Holds what a slice shows: `images` uint8 [H, W, 3] by camera number in `rig`, and its `caption`.

    A camera number of -1 says that there is no camera.
    """

    images: dict[int, np.ndarray]
    caption: str
    rig: Rig = STANDARD


def read_slice(run: RunView, source: str, shard: int, row: int, chunk: int) -> SliceImages:
    """Read the slice of a held-out row that its action chunk number `chunk` belongs to."""
    files = next(files for files in run.sources.files("heldout") if files.name == source)
    index = ShardIndex.read(files.tars[shard], run.sources.storage)
    segments = index.row_segments(row)
    number = segments["slice"][np.flatnonzero(segments["modality"] == Modality.ACTION)[chunk]]
    images: dict[int, np.ndarray] = {}
    caption = ""
    for segment in segments[segments["slice"] == number]:
        if segment["modality"] == Modality.VISION:
            images.setdefault(
                int(segment["camera"]),
                _image(run.sources.storage, index, row, segment, run.config.data.video_backend),
            )
        elif segment["modality"] == Modality.TEXT:
            caption = run.tokenizers.text.decode(index.row_text(row)[segment["start"] : segment["stop"]])
    return SliceImages(images, caption, run.sources.manifests[source].rig)


def slice_card(item: dict[str, Any], names: list[str], found: SliceImages) -> Markup:
    """Render one slice as HTML: its images as the rig sees them, its caption, its action as logged and predicted."""
    shown: list[tuple[str, np.ndarray | None]] = [("", image) for image in found.images.values()]
    if len(found.images) > 1:
        cameras = AROUND if found.rig == STANDARD else found.rig.cameras
        shown = [(name.replace("_", " "), found.images.get(found.rig.number(name))) for name in cameras]
    images = [(name, None if image is None else data_uri(image)) for name, image in shown]
    actions = zip(names, zip(*item["true"]), zip(*item["predicted"]))
    kind = "rig" if len(found.images) > 1 else "single"
    return parts.slice(kind, images, found.caption, len(item["true"]), actions, item["recording"])


def data_uri(pixels: np.ndarray) -> str:
    """Encode an image uint8 [H, W, 3] as a data URI.

    It is PNG where it is small, else JPEG of at most `MAX_IMAGE_WIDTH` pixels width.
    """
    with needs("images in the report"):
        from PIL import Image
    image = Image.fromarray(pixels)
    if image.width > MAX_IMAGE_WIDTH:
        image = image.resize(
            (MAX_IMAGE_WIDTH, max(1, round(image.height * MAX_IMAGE_WIDTH / image.width))), Image.Resampling.LANCZOS
        )
    kind = "png" if image.width * image.height <= _LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _image(storage: Storage, index: ShardIndex, row: int, segment: np.void, backend: VideoBackend) -> np.ndarray:
    member = int(segment["member"])
    stored = read_stored(index, row, member, storage)
    with needs("images in the report"):
        from mmoe.data.load.frames import stored_frames
        from mmoe.data.load.media import load_image
    if is_video(stored.name):
        frames = stored_frames(stored.content, backend, stored.where, index.row_decord(row, member))
        return frames.frames(np.array([segment["start"]]))[0]
    return load_image(stored.content, stored.where)
