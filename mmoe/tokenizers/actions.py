"""Turns actions into chunks of rows, normalized by quantiles or cut into bins."""

from typing import Literal

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.errors import ConfigError
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.bins import quantile_bins
from mmoe.tokenizers.vectors import Fences, is_constant


class ActionConfig(Config):
    """Says how actions are predicted: as numbers or bins, and how many rows at a time."""

    mode: Literal["continuous", "discrete"] = "continuous"  # numbers by a head, or bins with ids of their own
    chunk: int = Field(4, gt=0)  # rows of the action table predicted from one instant
    bins: int = Field(256, gt=1)  # discrete: per dimension; all dimensions share the ids
    binning: Literal["uniform", "quantile"] = "uniform"  # discrete: bins of equal width, or of equal training rows


class ActionTokenizer:
    """Rows [N, A] of a source's action table <-> numbers about [-1, 1], or bins.

    Normalization takes (q01, q99) of the training split to (-1, 1), as openpi does. Where the standard
    deviation exceeds half that range (a brake that is nearly always 0) it is the half range instead; a
    constant dimension becomes 0. Glitches are clipped to the fences of the statistics, nothing else is.

    `uniform` bins share that range between them; the outer two are open. `quantile` bins hold equal shares of
    the training rows, a frequent value alone in one, and each stands for the mean of its rows; both are as exact as
    the quantiles in `stats`, between which rows are taken to be spread evenly.
    """

    def __init__(self, config: ActionConfig, stats: VectorStats) -> None:
        """Raises ConfigError for quantile bins where `stats` lacks the quantiles."""
        self.config, self.names, self.fences = config, stats.names, Fences(stats)
        low, high = np.array(stats.q01), np.array(stats.q99)
        mean, std = np.array(stats.mean), np.array(stats.std)
        half = np.maximum((high - low) / 2, std)
        self._half = np.where(is_constant(mean, std), 0.0, half)
        self._center = np.where(is_constant(mean, std), mean, (low + high) / 2)
        self._scale = np.divide(1.0, self._half, out=np.zeros_like(half), where=self._half > 0)
        if config.mode == "discrete":
            self._borders, self._values = self._bins(stats)

    @property
    def dims(self) -> int:
        """Count the dimensions of an action."""
        return len(self.names)

    @property
    def tokens(self) -> int:
        """Positions one chunk takes: one, or one for each row and dimension."""
        return 1 if self.config.mode == "continuous" else self.config.chunk * self.dims

    def chunk_of(self, rows: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunk [H, A] that begins at row `start` of `rows` [N, A], and its mask [H, A].

        The episode ends before row `stop`; from there on the chunk is 0 and the mask False. Raises DataError
        for NaN and for what preparation did not see, naming the dimension.
        """
        if not 0 <= start <= stop <= len(rows):
            raise ValueError(f"a chunk from row {start} of an episode that ends at {stop} of {len(rows)} rows")
        present = rows[start : min(start + self.config.chunk, stop)]
        self.fences.check(present)
        target = np.zeros((self.config.chunk, self.dims), np.float32)
        target[: len(present)] = present
        mask = np.zeros(target.shape, bool)
        mask[: len(present)] = True
        return target, mask

    def normalize(self, rows: np.ndarray) -> np.ndarray:
        """Rows [..., A] in the source's units -> f32 [..., A]; what lies beyond a fence becomes the fence."""
        return ((self.fences.clip(rows) - self._center) * self._scale).astype(np.float32)

    def denormalize(self, normalized: np.ndarray) -> np.ndarray:
        """Undo `normalize`, but for what it clips; a constant dimension gives its constant."""
        return (normalized * self._half + self._center).astype(np.float32)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Rows [..., A] -> bins i64 [..., A]."""
        columns = [np.searchsorted(b, rows[..., a], side="right") for a, b in enumerate(self._borders)]
        return np.stack(columns, axis=-1).astype(np.int64)

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """Bins [..., A] -> f32 [..., A], what each bin stands for."""
        return self._values[np.arange(self.dims), bins].astype(np.float32)

    def round_trip_error(self, rows: np.ndarray) -> dict[str, float]:
        """Root mean square error by dimension, in its units, of rows [N, A] written and read back.

        Of what lies within the fences: what is clipped is counted on its own.
        """
        rows = self.fences.clip(rows)
        discrete = self.config.mode == "discrete"
        back = self.decode(self.encode(rows)) if discrete else self.denormalize(self.normalize(rows))
        return dict(zip(self.names, np.sqrt(((back - rows) ** 2).mean(0)).tolist()))

    def _bins(self, stats: VectorStats) -> tuple[np.ndarray, np.ndarray]:
        """Inner borders [A, bins - 1] and the value each bin stands for [A, bins]."""
        bins = self.config.bins
        if self.config.binning == "uniform":
            edges = self._center[:, None] + np.linspace(-1, 1, bins + 1) * self._half[:, None]
            return edges[:, 1:-1], (edges[:, :-1] + edges[:, 1:]) / 2
        if not stats.quantiles:
            raise ConfigError(
                "tokenizers.action.binning quantile needs the quantiles of the actions, which the manifest of a source "
                "does not hold; prepare the source again or set tokenizers.action.binning to uniform"
            )
        columns = [quantile_bins(knots, bins) for knots in np.array(stats.quantiles)]
        return np.stack([borders for borders, _ in columns]), np.stack([values for _, values in columns])
