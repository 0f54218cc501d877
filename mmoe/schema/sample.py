"""Describes a recording before it becomes tokens: modalities, cameras, segments, samples.

A *sample* is an ordered list of *segments*. A segment has one modality and says which bytes of which member
of the sample hold its payload, with the geometry its token count follows from. So an index of segments is
enough to plan an epoch, and decoding is "load the payload of these segments".
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from mmoe.schema.modality import Modality


class Camera(IntEnum):
    """Numbers the cameras of the standard rig (`mmoe.schema.rig`)."""

    FRONT = 0
    FRONT_LEFT = 1
    FRONT_RIGHT = 2
    BACK = 3
    BACK_LEFT = 4
    BACK_RIGHT = 5


NO_CAMERA = -1  # of an image that no camera of a rig took, such as a photograph
NO_SLICE = -1
NO_PAIR = -1
GIVEN = 1  # the `rate` of a text that is read and not predicted: what a user said to an assistant
ALIGNMENT_NS = 1_000_000  # that the time of a reading may be from the time in its file

# One row per segment; the same fields stand in the shard index. See `Segment` for their meaning.
SEGMENT_DTYPE = np.dtype(
    [
        ("modality", "u1"),
        ("slice", "i4"),
        ("camera", "i1"),
        ("timestamp_ns", "i8"),
        ("offset_ns", "i8"),
        ("member", "i2"),
        ("start", "i8"),
        ("stop", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("rate", "i4"),
        ("pair", "i4"),
        ("text_hash", "i8"),
    ]
)
SEGMENT_FIELDS: tuple[str, ...] = SEGMENT_DTYPE.names or ()


@dataclass(frozen=True)
class Segment:
    """Describes one piece of a sample.

    `member` names the file inside the sample (its WebDataset field, e.g. ``front.mp4``); `start`/`stop` is
    the half-open range in it, whose unit depends on the modality:

    ========= ================================================================ =======================
    modality  start, stop                                                      geometry
    ========= ================================================================ =======================
    TEXT      unused by readers (the writer sets the range of token ids)       rate: 0, or GIVEN
    VISION    frame indices of a video in presentation order; 0, 1 for an image height, width in pixels
    AUDIO     samples at `rate`                                                rate in Hz
    INERTIAL  rows of a float ``.npy`` [N, D]; one token a segment: its last row -
    STATE     as INERTIAL                                                      -
    ACTION    first row at or after the reference, and the row count: a chunk  -
              of H steps is rows start..start+H, padding after `stop`
    ========= ================================================================ =======================

    `timestamp_ns` is the slice's reference time (clip time, signed, nanoseconds), `offset_ns` this member's
    own time minus the reference. `slice` numbers the time slices of the sample from 0, -1 outside one.
    `camera` is a number of the source's rig.
    Segments that share `pair` >= 0 are the two sides of one contrastive pair (images or audio, and text).
    """

    modality: Modality
    member: str
    start: int = 0
    stop: int = 1
    height: int = 0
    width: int = 0
    rate: int = 0
    slice: int = NO_SLICE
    camera: int = NO_CAMERA
    timestamp_ns: int = 0
    offset_ns: int = 0
    pair: int = NO_PAIR
    text: str = ""


@dataclass
class Sample:
    """Holds what a reader yields and a shard stores: named members (raw bytes) and the ordered segments over them.

    `key` has no dot in its last part (WebDataset cuts a key at the first one there). `recording` is what splits hold
    out as a whole: a drive, an episode, a speaker's take. Within a time slice all VISION segments come first.
    `flags` counts what was kept or left out although it is not as it should be; preparation adds them up. `cancelled`
    are the members of audio that the reader mixed, and whose channels cancel out.
    """

    key: str
    recording: str
    members: dict[str, bytes]
    segments: list[Segment] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    cancelled: frozenset[str] = frozenset()
