"""Says which channel of audio is heard where it has several, and what silence is.

Models hear one channel. The mean of all is what most recordings want; of some it is nothing: channels of opposite phase
cancel out. The choice is a context variable, as the bounds are, because audio is mixed deep inside readers: preparation
sets it once around its work, so that it holds for every reader.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmoe.errors import Refused

AudioChannel = Literal["mix", "left", "right"] | Annotated[int, Field(ge=0)]  # the mean of all, or one by its number

SILENT_RMS = 1e-5  # of full scale; below it audio is silence: scaling it up would only amplify quantization noise
CANCELLED_SHARE = 0.01  # of the level of the loudest channel; a mix below it is what coding left over

SILENT = "audio: silent"
CANCELLED = "audio: silent, its channels cancel out"
SILENT_OUT, CANCELLED_OUT = f"{SILENT}, left out", f"{CANCELLED}, left out"

_NUMBERS = {"left": 0, "right": 1}
_channel: ContextVar[AudioChannel] = ContextVar("channel", default="mix")


def heard_channel() -> AudioChannel:
    """Return the channel that is heard here."""
    return _channel.get()


@contextmanager
def hearing(channel: AudioChannel) -> Iterator[None]:
    """Within the context, `heard_channel` gives `channel`."""
    token = _channel.set(channel)
    try:
        yield
    finally:
        _channel.reset(token)


def to_mono(samples: np.ndarray, where: str) -> np.ndarray:
    """Take the channel that is heard out of samples [n, channels]; audio of one channel is what it is.

    Raises `Refused`, in which `where` names the file, for a channel that it does not have.
    """
    channel, count = heard_channel(), samples.shape[1]
    if count == 1:
        return samples[:, 0]
    if channel == "mix":
        return samples.mean(axis=1)
    number = channel if isinstance(channel, int) else _NUMBERS[channel]
    if number >= count:
        message = (
            f"{where} has {count} channels, numbered from 0; set prepare.audio_channel to one below {count}, or to mix"
        )
        raise Refused("no such audio channel", message)
    return samples[:, number]


def find_silence(heard: float, loudest: float) -> str | None:
    """Return the flag of audio that is silent as it is heard, by its level and that of its loudest channel (RMS)."""
    if loudest > SILENT_RMS and heard < CANCELLED_SHARE * loudest:
        return CANCELLED
    return SILENT if heard <= SILENT_RMS else None
