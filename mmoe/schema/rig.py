"""Names the cameras of a source and of a run, with their numbers."""

import re
from collections.abc import Iterable
from typing import Final

import numpy as np
from pydantic import field_validator

from mmoe.config.base import Config
from mmoe.errors import ConfigError, brief, did_you_mean
from mmoe.schema.sample import NO_CAMERA, Camera

MOST_CAMERAS = 127  # the camera of a position is an int8, and one of its numbers says that there is none

_WORD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


class Rig(Config):
    """Names cameras in order: the number of a camera is its place."""

    cameras: tuple[str, ...]  # names: a camera's number is its place

    @field_validator("cameras")
    @classmethod
    def _names(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        if len(cameras) > MOST_CAMERAS:
            raise ValueError(f"a rig of {len(cameras)} cameras is too large; name {MOST_CAMERAS} at most")
        for number, name in enumerate(cameras):
            if not _WORD.fullmatch(name):
                raise ValueError(f"{brief(name)} is no name of a camera; write a lower-case word such as wrist_left")
            if name in cameras[:number]:
                raise ValueError(f"two cameras are named {brief(name)}; give each a name of its own")
        return cameras

    @classmethod
    def union(cls, rigs: Iterable["Rig"]) -> "Rig":
        """Join the rigs of a run's sources: the standard cameras, then the others in the order they are first named.

        The standard ones come first whether or not a source has them, so their numbers are the same in every run.
        Raises ConfigError where the run has more than `MOST_CAMERAS`.
        """
        names = tuple(dict.fromkeys([*STANDARD.cameras, *(name for rig in rigs for name in rig.cameras)]))
        if len(names) > MOST_CAMERAS:
            raise ConfigError(
                f"data.sources: they have {len(names)} cameras with the {len(STANDARD.cameras)} standard ones, and a "
                f"run can tell {MOST_CAMERAS} apart; prepare them with the same rig.cameras for the same cameras"
            )
        return cls(cameras=names)

    def number(self, name: str | None) -> int:
        """Find a camera's number; None has `NO_CAMERA`. Raises ConfigError naming the nearest one."""
        if name is None:
            return NO_CAMERA
        if name not in self.cameras:
            hint = did_you_mean(name, self.cameras) or "."
            known = brief(", ".join(self.cameras) or "none", 200, quoted=False)
            raise ConfigError(f"{brief(name)} is no camera of the rig{hint} Name it in rig.cameras, which has {known}")
        return self.cameras.index(name)

    def numbers(self, local: "Rig") -> np.ndarray:
        """Map the numbers of `local`, whose cameras are all in this rig, to the numbers here: i8 [cameras + 1].

        The last one is `NO_CAMERA`, so that -1 maps to itself.
        """
        return np.array([*map(self.number, local.cameras), NO_CAMERA], np.int8)


STANDARD: Final = Rig(cameras=tuple(camera.name.lower() for camera in Camera))
"""The rig of what names none: the six cameras around a car."""
