"""Computes statistics of vector streams in bounded memory, whatever the number of rows and whoever counted them.

Mean and variance are exact: each table's moments in float64, joined in the order of the samples (Chan et al. 1979).
Quantiles come from the `RESERVOIR` rows whose keyed hash is smallest, which is a uniform sample of all rows: exact
below that many rows, above it a quantile p is that of a rank p +- sqrt(p (1 - p) / RESERVOIR) (one standard
deviation; 0.01 +- 0.0004, 0.5 +- 0.002).

A glitch (65535 from a loose cable) must not decide about a scale. So every dimension has two fences, far outside of
what all but the rarest rows hold: `FENCE` times the range of those rows beyond each end of it. Where every row lies
within them, as in all ordinary data, they change nothing. Else mean and variance are those of the rows of the
reservoir that lie within, and what lies outside is clipped to the fences, and counted.
"""

import numpy as np

from mmoe.hashing import INCREMENT, mixed_u64
from mmoe.schema.vectors import VectorStats

RESERVOIR = 1 << 16  # rows
KNOTS = 513  # quantiles kept of an action: 0, 1/512, ... 1; whatever fills one of 256 bins holds two of them
FENCE = 10.0  # a lognormal, Laplace or Student t3 variable stays within in 100,000 rows
# One row in so many may be a glitch at either end (and one always may); the second where the others are all equal.
RARE, RARE_BESIDE_ONE_VALUE = 1_000, 10_000
_JUDGED = 100  # rows below which nothing can be told to be a glitch


class VectorSummary:
    """Holds moments and a keyed reservoir of the rows of a stream with `dims` dimensions; merging is exact.

    N: rows of a table, n: rows in the reservoir, D: `dims`.
    """

    def __init__(self, dims: int, capacity: int = RESERVOIR) -> None:
        self.capacity = capacity
        self.count = 0
        self.mean = np.zeros(dims)
        self.m2 = np.zeros(dims)  # sum of squared deviations from the mean
        self.minimum, self.maximum = np.full(dims, np.inf), np.full(dims, -np.inf)  # of all rows
        self.rows = np.zeros((0, dims), np.float32)
        self.priorities = np.zeros(0, np.uint64)

    def add(self, table: np.ndarray, seed: int) -> None:
        """Add the rows [N, D] of one table; `seed`, a hash of its name, decides which of them enter the reservoir."""
        wide = table.astype(np.float64)
        mean = wide.mean(axis=0)
        self._join_moments(len(wide), mean, ((wide - mean) ** 2).sum(axis=0))
        self._join_range(wide.min(axis=0), wide.max(axis=0))
        start = np.uint64((seed + INCREMENT) % 2**64)
        self._join_rows(table.astype(np.float32), mixed_u64(start + np.arange(len(table), dtype=np.uint64)))

    def merge(self, other: "VectorSummary") -> None:
        """Add the rows of another summary."""
        if other.count:
            self._join_moments(other.count, other.mean, other.m2)
            self._join_range(other.minimum, other.maximum)
            self._join_rows(other.rows, other.priorities)

    @property
    def estimated(self) -> bool:
        """True if the reservoir holds a part of the rows only, so that what is counted in it is an estimate."""
        return self.count > self.capacity

    def sample(self) -> np.ndarray:
        """Return the reservoir's rows f32 [n, D]: all rows where there are at most `capacity`."""
        return self._smallest().rows

    def stats(
        self, names: tuple[str, ...], period_ns: int, knots: int = 0, heldout: "VectorSummary | None" = None
    ) -> VectorStats:
        """Compute the statistics of these rows, and what their fences clip of them and of `heldout`.

        `knots` > 1 adds that many quantiles a dimension, from the smallest row to the largest in the reservoir.
        """
        rows = np.sort(self.sample().astype(np.float64), axis=0)  # sorted: no sum depends on the order of merging
        low, high = _fences(rows if len(rows) >= _JUDGED else np.stack([self.minimum, self.maximum]))
        mean, std = self._moments_within(rows, low, high)
        clipped = {"train": self.outside(low, high)}
        minimum, maximum = self.minimum, self.maximum
        if heldout is not None:
            clipped["heldout"] = heldout.outside(low, high)
            minimum, maximum = np.minimum(minimum, heldout.minimum), np.maximum(maximum, heldout.maximum)
        rows = np.clip(rows, low, high)
        q01, q99 = np.quantile(rows, (0.01, 0.99), axis=0)
        quantiles = np.quantile(rows, np.linspace(0, 1, knots), axis=0).T if knots else np.zeros((0, 0))
        return VectorStats(
            names=names,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            q01=tuple(q01.tolist()),
            q99=tuple(q99.tolist()),
            quantiles=tuple(map(tuple, quantiles.tolist())),
            period_ns=period_ns,
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            minimum=tuple(minimum.tolist()),
            maximum=tuple(maximum.tolist()),
            clipped={split: tuple(counts.tolist()) for split, counts in clipped.items()},
        )

    def outside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Count the rows below `low` [D] or above `high` [D], by dimension: [D] i64.

        Exact up to the reservoir's capacity. Above it an estimate from the share in the reservoir, which is zero only
        where no row lies outside.
        """
        rows = self.sample()
        found = ((rows < low) | (rows > high)).sum(axis=0)
        if not self.estimated:
            return found
        some = (self.minimum < low) | (self.maximum > high)
        return np.maximum(np.rint(found * (self.count / len(rows))).astype(np.int64), some)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that `from_arrays` needs, to be stored."""
        self._smallest()
        return {
            "count": np.array(self.count),
            "mean": self.mean,
            "m2": self.m2,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "rows": self.rows,
            "priorities": self.priorities,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], capacity: int = RESERVOIR) -> "VectorSummary":
        """Make a summary again from what `arrays` gave."""
        summary = cls(len(arrays["mean"]), capacity)
        summary.count = int(arrays["count"])
        summary.mean, summary.m2 = arrays["mean"], arrays["m2"]
        summary.minimum, summary.maximum = arrays["minimum"], arrays["maximum"]
        summary.rows, summary.priorities = arrays["rows"], arrays["priorities"]
        return summary

    def _join_moments(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        total, apart = self.count + count, mean - self.mean
        self.m2 = self.m2 + m2 + apart**2 * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def _join_range(self, minimum: np.ndarray, maximum: np.ndarray) -> None:
        self.minimum, self.maximum = np.minimum(self.minimum, minimum), np.maximum(self.maximum, maximum)

    def _moments_within(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [D] of all rows where all lie within the fences, else of those of `rows` that do.

        A row on a fence counts as clipped, so that statistics of clipped rows are the same again.
        """
        mean, std = self.mean.copy(), np.sqrt(self.m2 / self.count)
        within = (rows > low) & (rows < high) | (low == high) & (rows == low)
        whole = (self.minimum > low) & (self.maximum < high) | (self.minimum == self.maximum)
        for d in np.flatnonzero(~whole):
            kept = rows[within[:, d], d]
            mean[d], std[d] = kept.mean(), kept.std()
        return mean, std

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


def _fences(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value [D] that is taken as it is, of `rows` [n, D] sorted by column; numbers of float32."""
    rare, rarest = (max(1, len(rows) // r) if len(rows) >= _JUDGED else 0 for r in (RARE, RARE_BESIDE_ONE_VALUE))
    one_value = rows[rare] == rows[-1 - rare]
    low = np.where(one_value, rows[rarest], rows[rare])
    high = np.where(one_value, rows[-1 - rarest], rows[-1 - rare])
    reach, limits = FENCE * (high - low), np.finfo(np.float32)
    low, high = (np.clip(x, limits.min, limits.max) for x in (low - reach, high + reach))
    return low.astype(np.float32).astype(np.float64), high.astype(np.float32).astype(np.float64)
