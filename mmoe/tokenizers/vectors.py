"""Inertial and state vectors: normalised by the statistics of the training split."""

import numpy as np

from mmoe.data.index import VectorStats
from mmoe.errors import DataError


def is_constant(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Whether a dimension never varied: its deviation is f32 rounding of its mean, or nothing."""
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


class VectorNormaliser:
    """(x - mean) / std by dimension; a dimension that never varied becomes 0."""

    def __init__(self, stats: VectorStats):
        self.names = stats.names
        self._mean, std = np.array(stats.mean), np.array(stats.std)
        constant = is_constant(self._mean, std)
        self._scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
        self._std = np.where(constant, 0.0, std)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values [..., D] in the source's units -> f32 [..., D]; DataError for NaN, naming the dimension."""
        require_finite(values, self.names)
        return ((values - self._mean) * self._scale).astype(np.float32)

    def inverse(self, normalised: np.ndarray) -> np.ndarray:
        """f32 [..., D] in the source's units; a dimension that never varied gives its mean."""
        return (normalised * self._std + self._mean).astype(np.float32)
