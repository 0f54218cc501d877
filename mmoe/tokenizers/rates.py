"""Says which sample rates can be turned into each other: the kernel's size follows from their ratio."""

import math

from mmoe.errors import DataError

LARGEST_KERNEL = 1 << 24  # values; common rates need some ten thousand, 44056 to 8000 Hz takes 5 million
_ZEROS, _ROLLOFF = 6, 0.99  # of torchaudio's windowed sinc


def kernel_size(rate: int, target: int) -> int:
    """Values of the kernel that resamples `rate` Hz to `target` Hz: a filter for each phase of the reduced ratio."""
    divisor = math.gcd(rate, target)
    taken, given = rate // divisor, target // divisor
    width = math.ceil(_ZEROS * taken / (min(taken, given) * _ROLLOFF))
    return given * (2 * width + taken)


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
