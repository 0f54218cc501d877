"""Says which sample rates can be turned into each other, and what of a recording a piece of it is resampled from."""

import math
from typing import TypeVar

import numpy as np

from mmoe.errors import DataError

Count = TypeVar("Count", int, np.ndarray)

LARGEST_KERNEL = 1 << 24  # values; common rates need some ten thousand, 44056 to 8000 Hz takes 5 million
_ZEROS, _ROLLOFF = 6, 0.99  # of torchaudio's windowed sinc


def kernel_size(rate: int, target: int) -> int:
    """Values of the kernel that resamples `rate` Hz to `target` Hz: a filter for each phase of the reduced ratio."""
    taken, given = _ratio(rate, target)
    return given * (2 * _filter_reach(rate, target) + taken)


def resampled_length(samples: Count, rate: Count | int, target: int) -> Count:
    """Give how many samples the first `samples` of a recording become: samples * target / rate, rounded (half up).

    What stands between two places of a recording becomes the difference of theirs, so the pieces of a recording have as
    many samples as the whole. Elementwise over numpy arrays, in integers.
    """
    return (2 * samples * target + rate) // (2 * rate)


def resampling_range(start: int, stop: int, rate: int, target: int) -> tuple[int, int]:
    """Give the samples of a recording that its piece [start, stop) is resampled from; they may lie behind its end.

    They begin where a sample of `target` Hz stands at the very place of one of `rate` Hz.
    """
    if rate == target or start == stop:
        return start, stop
    (taken, given), reach = _ratio(rate, target), _filter_reach(rate, target)
    first = resampled_length(start, rate, target) // given - -(-reach // taken)
    last = resampled_length(stop, rate, target) // given + 1
    return max(0, first * taken), max(stop, last * taken + reach)


def _ratio(rate: int, target: int) -> tuple[int, int]:
    divisor = math.gcd(rate, target)
    return rate // divisor, target // divisor


def _filter_reach(rate: int, target: int) -> int:
    """Samples of `rate` Hz to either side that a resampled one follows from."""
    taken, given = _ratio(rate, target)
    return math.ceil(_ZEROS * taken / (min(taken, given) * _ROLLOFF))


def check_rates(rate: int, target: int, where: str) -> None:
    """Raise DataError where audio of `rate` Hz cannot be resampled to `target` Hz in a sensible amount of memory."""
    if rate < 1 or target < 1:
        raise DataError(f"{where} has a sample rate of {rate} Hz, to be {target} Hz; give it a positive one")
    if rate != target and kernel_size(rate, target) > LARGEST_KERNEL:
        raise DataError(
            f"{where} has a sample rate of {rate} Hz, which shares too few factors with the codec's {target} Hz (the "
            f"filter would have {kernel_size(rate, target):,} values); convert it to a common rate such as 16000 or "
            "44100 Hz, or leave it out"
        )
