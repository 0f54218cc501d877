"""Which share of the positions each source gets."""

import numpy as np

from mmoe.errors import ConfigError


def temperature_shares(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """``P(i) = n_i ** (1 / T) / sum_j n_j ** (1 / T)`` over source sizes n_i in positions (recipes.md, 5)."""
    weights = np.array(list(sizes.values()), dtype=np.float64) ** (1.0 / temperature)
    return dict(zip(sizes, (weights / weights.sum()).tolist()))


def explicit_shares(weights: dict[str, float]) -> dict[str, float]:
    """Weights scaled to sum to 1."""
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise ConfigError(f"data.sources weights must be >= 0 with a positive sum, got {weights}")
    return {name: weight / total for name, weight in weights.items()}
