"""Computes bounds on what a finite number of trials shows."""

import math

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t


def wilson_low(share: float, trials: float) -> float:
    """Return the lower end of the two-sided 95 % interval of a proportion (Wilson 1927).

    `share` is the proportion seen in `trials` trials.
    """
    if trials <= 0:
        return 0.0
    square = Z95 * Z95
    center = share + square / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, (center - spread) / (1 + square / trials))


def mean_low(values: np.ndarray) -> float:
    """Return the lower end of the two-sided 95 % interval of the mean of `values` [n], n >= 2, by Student's t."""
    t = _T95.get(len(values) - 1, 2.262)  # with more than ten values this errs on the wide side
    return float(values.mean() - t * values.std(ddof=1) / math.sqrt(len(values)))
