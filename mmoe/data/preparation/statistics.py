"""Statistics of vector streams that fit in memory whatever the number of rows, and do not depend on who counted.

Mean and variance are exact: each table's moments in float64, joined in the order of the samples (Chan et al. 1979).
Quantiles come from the `RESERVOIR` rows whose keyed hash is smallest, which is a uniform sample of all rows: exact
below that many rows, above it a quantile p is that of a rank p +- sqrt(p (1 - p) / RESERVOIR) (one standard
deviation; 0.01 +- 0.0004, 0.5 +- 0.002).
"""

import numpy as np

from mmoe.data.index import VectorStats

RESERVOIR = 1 << 16  # rows
KNOTS = 257  # quantiles kept of an action: 0, 1/256, ... 1


class VectorSummary:
    """Moments and a keyed reservoir of the rows of a stream with `dims` dimensions; merging is exact."""

    def __init__(self, dims: int, capacity: int = RESERVOIR):
        self.capacity = capacity
        self.count = 0
        self.mean = np.zeros(dims)
        self.m2 = np.zeros(dims)  # sum of squared deviations from the mean
        self.rows = np.zeros((0, dims), np.float32)
        self.priorities = np.zeros(0, np.uint64)

    def add(self, table: np.ndarray, seed: int) -> None:
        """The rows [N, D] of one table; `seed`, a hash of its name, decides which of them enter the reservoir."""
        wide = table.astype(np.float64)
        mean = wide.mean(axis=0)
        self._join_moments(len(wide), mean, ((wide - mean) ** 2).sum(axis=0))
        self._join_rows(
            table.astype(np.float32), _mix(np.uint64(seed % 2**64) + np.arange(len(table), dtype=np.uint64))
        )

    def merge(self, other: "VectorSummary") -> None:
        if other.count:
            self._join_moments(other.count, other.mean, other.m2)
            self._join_rows(other.rows, other.priorities)

    def sample(self) -> np.ndarray:
        """The reservoir's rows f32 [n, D]: all rows where there are at most `capacity`."""
        return self._smallest().rows

    def stats(self, names: tuple[str, ...], period_ns: int, knots: int = 0) -> VectorStats:
        """`knots` > 1 adds that many quantiles a dimension, from the smallest row to the largest in the reservoir."""
        rows = self.sample().astype(np.float64)
        q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
        quantiles = np.quantile(rows, np.linspace(0, 1, knots), axis=0).T if knots else np.zeros((0, 0))
        return VectorStats(
            names=names,
            mean=tuple(self.mean.tolist()),
            std=tuple(np.sqrt(self.m2 / self.count).tolist()),
            q01=tuple(q01.tolist()),
            q99=tuple(q99.tolist()),
            quantiles=tuple(map(tuple, quantiles.tolist())),
            period_ns=period_ns,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All that `from_arrays` needs, to be stored."""
        self._smallest()
        return {
            "count": np.array(self.count),
            "mean": self.mean,
            "m2": self.m2,
            "rows": self.rows,
            "priorities": self.priorities,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], capacity: int = RESERVOIR) -> "VectorSummary":
        summary = cls(len(arrays["mean"]), capacity)
        summary.count = int(arrays["count"])
        summary.mean, summary.m2 = arrays["mean"], arrays["m2"]
        summary.rows, summary.priorities = arrays["rows"], arrays["priorities"]
        return summary

    def _join_moments(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        total, apart = self.count + count, mean - self.mean
        self.m2 = self.m2 + m2 + apart**2 * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def _join_rows(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        self.rows = np.concatenate([self.rows, rows])
        self.priorities = np.concatenate([self.priorities, priorities])
        if len(self.rows) > 2 * self.capacity:  # not at every table: sorting is dear
            self._smallest()

    def _smallest(self) -> "VectorSummary":
        if len(self.rows) > self.capacity:
            kept = np.sort(np.argsort(self.priorities, kind="stable")[: self.capacity])
            self.rows, self.priorities = self.rows[kept], self.priorities[kept]
        return self


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: u64 -> u64, one to one and without visible order."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
