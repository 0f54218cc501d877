"""Statistics of streams of numbers, as a prepared source states them."""

from collections import Counter

from pydantic import Field, model_validator

from mmoe.config.base import Config

_BY_DIMENSION = ("names", "mean", "std", "q01", "q99", "quantiles", "low", "high", "minimum", "maximum")


class VectorStats(Config):
    """Holds statistics by dimension of an ACTION, STATE or INERTIAL stream over the training split.

    Values outside `low` to `high` are glitches: clipped when they are read, and not in mean and std. `clipped` counts
    those rows, by split and dimension: exact up to `statistics.RESERVOIR` rows, estimated above. Manifests written
    before there were such fences have none of the last five.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    period_ns: int = 0  # of the rows of an action table; 0 where rows have no fixed period
    quantiles: tuple[tuple[float, ...], ...] = ()  # by dimension, evenly spaced from the minimum to the maximum
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    minimum: tuple[float, ...] = ()  # of all rows of all splits, as float32: no row of the source is below it
    maximum: tuple[float, ...] = ()
    clipped: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    def take(self, columns: list[int]) -> "VectorStats":
        """Return the statistics of these dimensions."""
        held = {field: getattr(self, field) for field in _BY_DIMENSION}
        chosen = {field: tuple(values[column] for column in columns) for field, values in held.items() if values}
        clipped = {split: tuple(counts[c] for c in columns) for split, counts in self.clipped.items()}
        return self.model_copy(update={**chosen, "clipped": clipped})

    @model_validator(mode="after")
    def _one_value_a_name(self) -> "VectorStats":
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"the dimension name {repeated[0]} occurs twice among {', '.join(self.names)}")
        needed = {"mean", "std", "q01", "q99"}
        columns = {f: getattr(self, f) for f in (*sorted(needed), "quantiles", "low", "high", "minimum", "maximum")}
        columns |= {f"clipped.{split}": counts for split, counts in self.clipped.items()}
        for field, values in columns.items():
            if len(values) != len(self.names) and (values or field in needed):
                raise ValueError(f"{field} has {len(values)} values for {len(self.names)} dimensions")
        return self
