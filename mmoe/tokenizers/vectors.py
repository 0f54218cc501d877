"""Inertial and state vectors: normalized by the statistics of the training split."""

import numpy as np

from mmoe.errors import DataError
from mmoe.schema.vectors import VectorStats


def is_constant(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return whether a dimension never varied: its deviation is f32 rounding of its mean, or nothing."""
    return std <= np.maximum(1e-8, 1e-7 * np.abs(mean))


def require_finite(values: np.ndarray, names: tuple[str, ...]) -> None:
    """Raises DataError naming the first dimension (last axis of `values`) that holds NaN or infinity."""
    if values.shape[-1] != len(names):
        raise DataError(
            f"a row of {values.shape[-1]} values stands where {len(names)} are known ({', '.join(names)}); "
            "prepare the source again"
        )
    bad = ~np.isfinite(values).reshape(-1, len(names)).all(0)
    if bad.any():
        raise DataError(f"{names[int(bad.argmax())]} holds NaN or infinity; repair or leave out the recording")


class Fences:
    """Bounds what readings of a source may be: none outside of what preparation saw, and glitches among those clipped.

    Statistics of manifests that hold no fences allow everything and clip nothing.
    """

    def __init__(self, stats: VectorStats) -> None:
        self.names = stats.names
        infinite = np.full(len(stats.names), np.inf)
        self._low, self._high = np.array(stats.low or -infinite), np.array(stats.high or infinite)
        self._minimum, self._maximum = np.array(stats.minimum or -infinite), np.array(stats.maximum or infinite)

    def check(self, values: np.ndarray) -> None:
        """Raises DataError naming the first dimension (last axis) that holds NaN, infinity or what no row can hold."""
        require_finite(values, self.names)
        with np.errstate(over="ignore"):
            rows = values.reshape(-1, len(self.names)).astype(np.float32)  # as preparation compared them
        wrong = (rows < self._minimum) | (rows > self._maximum)
        if wrong.any():
            dimension = int(wrong.any(0).argmax())
            value = values.reshape(-1, len(self.names))[int(wrong[:, dimension].argmax()), dimension]
            raise DataError(
                f"{self.names[dimension]} is {value:.6g}, but preparation saw {self._minimum[dimension]:.6g} to "
                f"{self._maximum[dimension]:.6g} in this source: its bytes have changed since; copy the shard again "
                "from where it is whole, or prepare the source again"
            )

    def clip(self, values: np.ndarray) -> np.ndarray:
        """Values [..., D] with glitches replaced by the nearer fence."""
        return np.clip(values, self._low, self._high)


class VectorNormalizer:
    """Computes (x - mean) / std by dimension, x clipped to the fences; a dimension that never varied becomes 0."""

    def __init__(self, stats: VectorStats) -> None:
        self.fences = Fences(stats)
        self._mean, std = np.array(stats.mean), np.array(stats.std)
        constant = is_constant(self._mean, std)
        self._scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
        self._std = np.where(constant, 0.0, std)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values [..., D] in the source's units -> f32 [..., D].

        Raises DataError for NaN and for what preparation did not see, naming the dimension.
        """
        self.fences.check(values)
        return ((self.fences.clip(values) - self._mean) * self._scale).astype(np.float32)

    def inverse(self, normalized: np.ndarray) -> np.ndarray:
        """Return f32 [..., D] in the source's units; a dimension that never varied gives its mean."""
        return (normalized * self._std + self._mean).astype(np.float32)
