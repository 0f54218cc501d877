"""Check that what an index says can be true, before any of it is used as a place, a size or a number.

Checksums tell a damaged index; this tells one that was written wrongly, or by somebody else.
"""

import tarfile

import numpy as np

from mmoe.errors import DataError
from mmoe.schema.modality import Modality
from mmoe.schema.rig import MOST_CAMERAS
from mmoe.schema.sample import NO_CAMERA, NO_PAIR, NO_SLICE

_FURTHEST = 1 << 50  # bytes of a tar
_LARGEST = {  # of a segment, by field: least and greatest
    "slice": (NO_SLICE, 1 << 30),
    "camera": (NO_CAMERA, MOST_CAMERAS - 1),
    "start": (0, 1 << 40),
    "stop": (0, 1 << 40),
    "height": (0, 1 << 17),
    "width": (0, 1 << 17),
    "rate": (0, 1 << 30),
    "pair": (NO_PAIR, 1 << 30),
}
_MOST_FRAMES = 1 << 20  # of one segment


def check_segments(path: str, segments: np.ndarray) -> None:
    """Raise DataError where a field of a segment is out of its range, or a range ends before it begins."""
    bounds = {"modality": (0, len(Modality) - 1), **_LARGEST}
    for name, (least, greatest) in bounds.items():
        values = segments[name]
        if len(values) and not least <= int(values.min()) <= int(values.max()) <= greatest:
            raise _impossible(path, f"{name} of a segment lies outside {int(least)} to {int(greatest)}")
    seen, heard = segments["modality"] == Modality.VISION, segments["modality"] == Modality.AUDIO
    if (seen & ((segments["height"] < 1) | (segments["width"] < 1)) | heard & (segments["rate"] < 1)).any():
        raise _impossible(path, "an image has no size, or an audio clip no rate")
    if (segments["stop"] < segments["start"]).any():
        raise _impossible(path, "a segment stops before it starts")
    if (segments["stop"] - segments["start"])[seen].max(initial=0) > _MOST_FRAMES:
        raise _impossible(path, f"a segment has more than {_MOST_FRAMES} frames")


def check_members(
    path: str, segments: np.ndarray, segment_offsets: np.ndarray, ranges: np.ndarray, member_offsets: np.ndarray
) -> None:
    """Raise DataError where a member lies nowhere in a tar, or a segment names one that its row has not.

    `ranges` [members, 2]: offset and size; the offsets cut segments and members into rows.
    """
    offset, size = ranges[:, 0], ranges[:, 1]
    if (offset < tarfile.BLOCKSIZE).any() or (size < 0).any() or (offset > _FURTHEST).any() or (size > _FURTHEST).any():
        raise _impossible(path, "a member lies outside the tar")
    count = np.repeat(np.diff(member_offsets), np.diff(segment_offsets))
    held = segments["modality"] != Modality.TEXT
    if (held & ((segments["member"] < 0) | (segments["member"] >= count))).any():
        raise _impossible(path, "a segment names a member that its row has not")


def _impossible(path: str, said: str) -> DataError:
    return DataError(f"{path} is no usable shard index: {said}; prepare the source again")
