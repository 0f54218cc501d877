"""Actions: chunks of rows, normalised by quantiles or cut into bins."""

from typing import Literal

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.index import VectorStats
from mmoe.errors import ConfigError
from mmoe.tokenizers.vectors import is_constant, require_finite

_ROWS_PER_BIN = 64  # that a quantile bin is fitted to


class ActionConfig(Config):
    mode: Literal["continuous", "discrete"] = "continuous"
    chunk: int = Field(4, gt=0)  # rows of the action table predicted from one instant
    bins: int = Field(256, gt=1)  # discrete: per dimension; all dimensions share the ids
    binning: Literal["uniform", "quantile"] = "uniform"  # discrete: bins of equal width, or of equal training rows


class ActionTokenizer:
    """Rows [N, A] of a source's action table <-> numbers about [-1, 1], or bins.

    Normalisation takes (q01, q99) of the training split to (-1, 1), as openpi does. Where the standard
    deviation exceeds half that range (a brake that is nearly always 0) it is the half range instead; a
    constant dimension becomes 0. Nothing is clipped.

    `uniform` bins share that range between them; the outer two are open. `quantile` bins hold equal shares of
    the training rows, and each stands for the mean of its rows; both are as exact as the quantiles in `stats`,
    between which rows are taken to be spread evenly.
    """

    def __init__(self, config: ActionConfig, stats: VectorStats):
        """Raises ConfigError for quantile bins where `stats` lacks the quantiles."""
        self.config, self.names = config, stats.names
        low, high = np.array(stats.q01), np.array(stats.q99)
        mean, std = np.array(stats.mean), np.array(stats.std)
        half = np.maximum((high - low) / 2, std)
        self._half = np.where(is_constant(mean, std), 0.0, half)
        self._centre = np.where(is_constant(mean, std), mean, (low + high) / 2)
        self._scale = np.divide(1.0, self._half, out=np.zeros_like(half), where=self._half > 0)
        if config.mode == "discrete":
            self._borders, self._values = self._bins(stats)

    @property
    def dims(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        """Positions one chunk takes: one, or one for each row and dimension."""
        return 1 if self.config.mode == "continuous" else self.config.chunk * self.dims

    def chunk_of(self, rows: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunk [H, A] that begins at row `start` of `rows` [N, A], and its mask [H, A].

        The episode ends before row `stop`; from there on the chunk is 0 and the mask False. Raises DataError
        for NaN, naming the dimension.
        """
        if not 0 <= start <= stop <= len(rows):
            raise ValueError(f"a chunk from row {start} of an episode that ends at {stop} of {len(rows)} rows")
        present = rows[start : min(start + self.config.chunk, stop)]
        require_finite(present, self.names)
        target = np.zeros((self.config.chunk, self.dims), np.float32)
        target[: len(present)] = present
        mask = np.zeros(target.shape, bool)
        mask[: len(present)] = True
        return target, mask

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """Rows [..., A] in the source's units -> f32 [..., A]."""
        return ((rows - self._centre) * self._scale).astype(np.float32)

    def denormalise(self, normalised: np.ndarray) -> np.ndarray:
        """The inverse of `normalise`; a constant dimension gives its constant."""
        return (normalised * self._half + self._centre).astype(np.float32)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Rows [..., A] -> bins i64 [..., A]."""
        columns = [np.searchsorted(b, rows[..., a], side="right") for a, b in enumerate(self._borders)]
        return np.stack(columns, axis=-1).astype(np.int64)

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """Bins [..., A] -> f32 [..., A], what each bin stands for."""
        return self._values[np.arange(self.dims), bins].astype(np.float32)

    def round_trip_error(self, rows: np.ndarray) -> dict[str, float]:
        """Root mean square error by dimension, in its units, of rows [N, A] written and read back."""
        discrete = self.config.mode == "discrete"
        back = self.decode(self.encode(rows)) if discrete else self.denormalise(self.normalise(rows))
        return dict(zip(self.names, np.sqrt(((back - rows) ** 2).mean(0)).tolist()))

    def _bins(self, stats: VectorStats) -> tuple[np.ndarray, np.ndarray]:
        """Inner borders [A, bins - 1] and the value each bin stands for [A, bins]."""
        bins = self.config.bins
        if self.config.binning == "uniform":
            edges = self._centre[:, None] + np.linspace(-1, 1, bins + 1) * self._half[:, None]
            return edges[:, 1:-1], (edges[:, :-1] + edges[:, 1:]) / 2
        if not stats.quantiles:
            raise ConfigError(
                "tokenizers.action.binning quantile needs the quantiles of the actions, which the manifest of a source "
                "does not hold; prepare the source again or set tokenizers.action.binning to uniform"
            )
        rows = _rows_of(np.array(stats.quantiles), _ROWS_PER_BIN * bins)
        edges = np.quantile(rows, np.linspace(0, 1, bins + 1), axis=0).T
        borders = edges[:, 1:-1]
        values = (edges[:, :-1] + edges[:, 1:]) / 2  # of bins that no training row falls in
        for a, column in enumerate(rows.T):
            index = np.searchsorted(borders[a], column, side="right")
            count = np.bincount(index, minlength=bins)
            total = np.bincount(index, weights=column, minlength=bins)
            values[a] = np.where(count > 0, total / np.maximum(count, 1), values[a])
        return borders, values


def _rows_of(quantiles: np.ndarray, count: int) -> np.ndarray:
    """`count` rows [count, A] with these quantiles [A, K] of evenly spaced shares, spread evenly between them.

    Shares that lie between two quantiles of one value are that value, so what is often exactly 0 stays 0.
    """
    shares, known = np.linspace(0, 1, count), np.linspace(0, 1, quantiles.shape[1])
    return np.stack([np.interp(shares, known, column) for column in quantiles], axis=1)
