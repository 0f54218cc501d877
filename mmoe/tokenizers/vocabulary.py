"""Defines one id space for all that the model predicts or reads: structure, placeholders, text, audio, actions.

Ids of text never move: what structure a run needs besides the tokens below follows the other ranges.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from mmoe.errors import ConfigError
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig


class Structure(IntEnum):
    """Names the structure tokens, whose ids are the first of the vocabulary and never move."""

    PAD = 0
    BOS = 1
    EOS = 2
    IMAGE_START = 3
    IMAGE_END = 4
    VIDEO_START = 5
    VIDEO_END = 6
    SLICE_START = 7
    SLICE_END = 8
    AUDIO_START = 9
    AUDIO_END = 10
    CAM_FRONT = 11
    CAM_FRONT_LEFT = 12
    CAM_FRONT_RIGHT = 13
    CAM_BACK = 14
    CAM_BACK_LEFT = 15
    CAM_BACK_RIGHT = 16
    TIMESTAMP = 17
    STATE = 18
    ACTION = 19
    ACTION_END = 20


class Placeholder(IntEnum):
    """Ids that stand where a continuous vector travels beside the ids (`state` and `action` have their own)."""

    VISION = len(Structure)
    INERTIAL = len(Structure) + 1


def further_cameras(rig: Rig) -> tuple[str, ...]:
    """Name the tokens of the cameras of a run that are not standard, as the vocabulary has them in `further`."""
    return tuple(_camera_token(name) for name in rig.cameras if name not in STANDARD.cameras)


def _camera_token(name: str) -> str:
    return f"cam_{name}"


@dataclass(frozen=True)
class Vocabulary:
    """Lays out ranges of token ids by name: ``structure | placeholder | text | audio | action | further | category``.

    `audio_codebooks` x `audio_codebook_size` ids belong to the audio codec (codebook major) and
    `action_bins` to discrete actions; 0 leaves the range empty. `further` names structure tokens that only some runs
    have, first those of cameras (`further_cameras`), and `categories` the values of actions that are no numbers, as
    ``dimension=value``. Raises ConfigError where a name stands for two tokens.
    """

    text_size: int
    audio_codebooks: int = 0
    audio_codebook_size: int = 0
    action_bins: int = 0
    further: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [*(token.name.lower() for token in (*Structure, *Placeholder)), *self.further]
        if twice := sorted({name for name in self.further if names.count(name) > 1}):
            raise ConfigError(f"two structure tokens are named {twice[0]}; give what it stands for another name")

    @property
    def ranges(self) -> dict[str, range]:
        """Give the ids of each range by its name."""
        sizes = {
            "structure": len(Structure),
            "placeholder": len(Placeholder),
            "text": self.text_size,
            "audio": self.audio_codebooks * self.audio_codebook_size,
            "action": self.action_bins,
            "further": len(self.further),
            "category": len(self.categories),
        }
        ranges, start = {}, 0
        for name, size in sizes.items():
            ranges[name] = range(start, start + size)
            start += size
        return ranges

    @property
    def size(self) -> int:
        """Count all ids."""
        return self.ranges["category"].stop

    def audio_ids(self, codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
        """Ids of codec `codes` [n] drawn from codebook number `codebook` [n]."""
        return self.ranges["audio"].start + codebook.astype(np.int64) * self.audio_codebook_size + codes

    @cached_property
    def further_ids(self) -> dict[str, int]:
        """Give the ids of the further structure tokens by name."""
        return dict(zip(self.further, self.ranges["further"], strict=True))

    def camera_ids(self, rig: Rig) -> np.ndarray:
        """Ids of the tokens that announce the cameras of a run, by number in its `rig`: i64 [cameras]."""
        standard = {name: Structure[_camera_token(name).upper()] for name in STANDARD.cameras}
        ids = [standard[name] if name in standard else self.further_ids[_camera_token(name)] for name in rig.cameras]
        return np.array(ids, np.int64)

    def name(self, token: int) -> str:
        """Return a readable name of an id, e.g. ``cam_front``, ``text 17``, ``audio 1:205``."""
        if token in self.ranges["structure"]:
            return Structure(token).name.lower()
        if token in self.ranges["placeholder"]:
            return f"<{Placeholder(token).name.lower()}>"
        if token in self.ranges["further"]:
            return self.further[token - self.ranges["further"].start]
        if token in self.ranges["category"]:
            return self.categories[token - self.ranges["category"].start]
        for name in ("text", "audio", "action"):
            if token in self.ranges[name]:
                local = token - self.ranges[name].start
                if name == "audio":
                    return f"audio {local // self.audio_codebook_size}:{local % self.audio_codebook_size}"
                return f"{name} {local}"
        raise ValueError(f"token id {token} is outside the vocabulary of {self.size} ids")

    def modality_of(self, tokens: np.ndarray) -> np.ndarray:
        """Modality (u8) of predicted ids: TEXT, AUDIO, ACTION by range, STRUCTURE for everything else."""
        edges = [self.ranges[name].start for name in ("text", "audio", "action", "further", "category")]
        inside = (Modality.TEXT, Modality.AUDIO, Modality.ACTION, Modality.STRUCTURE, Modality.ACTION)
        kinds = np.array([Modality.STRUCTURE, *inside], dtype=np.uint8)
        return kinds[np.searchsorted(edges, tokens, side="right")]
