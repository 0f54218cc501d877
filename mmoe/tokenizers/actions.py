"""Turns actions into chunks of rows, normalized by quantiles or cut into bins."""

from collections.abc import Collection, Mapping
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
    """Rows [N, A] of the numbers of a source's action table <-> numbers about [-1, 1], or bins.

    Normalization takes (q01, q99) of the training split to (-1, 1), as openpi does. Where the standard
    deviation exceeds half that range (a brake that is nearly always 0) it is the half range instead; a
    constant dimension becomes 0. Glitches are clipped to the fences of the statistics, nothing else is.

    Dimensions of `categories` hold the numbers of named values. They are ids of their own whatever the mode, and no
    part of `names` and `dims`, of normalized rows and of bins: those are of the other columns, `columns` of a table.

    `uniform` bins share that range between them; the outer two are open. `quantile` bins hold equal shares of
    the training rows, a frequent value alone in one, and each stands for the mean of its rows; both are as exact as
    the quantiles in `stats`, between which rows are taken to be spread evenly.
    """

    def __init__(
        self, config: ActionConfig, stats: VectorStats, categories: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Raises ConfigError for quantile bins where `stats` lacks the quantiles."""
        named = categories or {}
        self.categories = {name: tuple(named[name]) for name in stats.names if name in named}
        self.columns = np.flatnonzero([name not in named for name in stats.names])
        self._named_columns = np.flatnonzero([name in named for name in stats.names])
        self._whole, stats = Fences(stats), stats.take(self.columns.tolist())
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
        """Count the dimensions of an action that are numbers."""
        return len(self.names)

    @property
    def number_tokens(self) -> int:
        """Positions that the numbers of one chunk take: one, or one for each row and dimension."""
        return 1 if self.config.mode == "continuous" else self.config.chunk * self.dims

    @property
    def tokens(self) -> int:
        """Positions one chunk takes: those of its numbers, then one for each row and dimension of named values."""
        return self.number_tokens + self.config.chunk * len(self.categories)

    def categories_of(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return the named values i64 [H, C] of the chunk as `chunk_of` has it, by their numbers; -1 after `stop`."""
        found = np.full((self.config.chunk, len(self.categories)), -1, np.int64)
        present = rows[start : min(start + self.config.chunk, stop), self._named_columns]
        found[: len(present)] = present  # whole numbers, as preparation has seen
        return found

    def chunk_of(self, rows: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunk [H, A] that begins at row `start` of `rows` [N, columns], and its mask [H, A].

        The episode ends before row `stop`; from there on the chunk is 0 and the mask False. Raises DataError
        for NaN and for what preparation did not see, naming the dimension.
        """
        if not 0 <= start <= stop <= len(rows):
            raise ValueError(f"a chunk from row {start} of an episode that ends at {stop} of {len(rows)} rows")
        present = rows[start : min(start + self.config.chunk, stop)]
        self._whole.check(present)
        present = present[:, self.columns]
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
        bins = np.zeros(rows.shape, np.int64)
        for a, borders in enumerate(self._borders):
            bins[..., a] = np.searchsorted(borders, rows[..., a], side="right")
        return bins

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
        if self.dims and not stats.quantiles:
            raise ConfigError(
                "tokenizers.action.binning quantile needs the quantiles of the actions, which the manifest of a source "
                "does not hold; prepare the source again or set tokenizers.action.binning to uniform"
            )
        if not self.dims:
            return np.zeros((0, bins - 1)), np.zeros((0, bins))
        columns = [quantile_bins(knots, bins) for knots in np.array(stats.quantiles)]
        return np.stack([borders for borders, _ in columns]), np.stack([values for _, values in columns])
