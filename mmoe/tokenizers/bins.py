"""Bins of equal shares of the rows of one dimension, in which a frequent value has a bin of its own.

Cut blindly at evenly spaced quantiles, a value that holds several of them (a brake that is 0 for 97 % of the rows)
gives bins between equal borders, which hold nothing, and shares the last of them with everything above it.
"""

from itertools import pairwise

import numpy as np

_ROWS_PER_BIN = 64  # that the value of a bin is the mean of


def quantile_bins(knots: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inner borders [bins - 1] and the value [bins] of each bin, of a dimension with the quantiles `knots` [K].

    `knots` are those of evenly spaced shares, from the minimum to the maximum; rows are taken to be spread evenly
    between two of them. Bin b holds what is at or above border b - 1 and below border b. A value with more than a
    bin's share of the rows is alone in its bin, which stands for exactly that value, as long as the bins suffice:
    else what lies beside it too rarely joins the nearer such value. Bins that nothing is left for are at the end,
    behind borders at infinity.
    """
    frequent = _frequent(knots, bins)
    if not frequent:
        return _even(knots, 0, len(knots) - 1, bins)
    # What lies below, between and above the frequent values: from the last knot of one to the first of the next.
    gaps = list(pairwise([0, *(at for run in frequent for at in run), len(knots) - 1]))[::2]
    shares = _deal(gaps, bins - len(frequent))
    starts: list[float] = []  # of bins, the first below everything
    values: list[float] = []
    for number, ((first, last), count) in enumerate(zip(gaps, shares)):
        below = knots[frequent[number - 1][0]] if number else None
        above = knots[frequent[number][0]] if number < len(frequent) else None
        if count:
            low = -np.inf if below is None else _around(below)[1]
            high = np.inf if above is None else _around(above)[0]
            inner, means = _even(knots, first, last, count, low, high)
            starts += [low, *inner]
            values += means.tolist()
        if above is not None:
            between = -np.inf if below is None else (below + above) / 2
            starts.append(_around(above)[0] if count else between)
            values.append(above)
    missing = bins - len(values)
    return np.array(starts[1:] + [np.inf] * missing), np.array(values + [values[-1]] * missing)


def _frequent(knots: np.ndarray, bins: int) -> list[tuple[int, int]]:
    """The first and the last knot of each value that has a bin of its own, in ascending order.

    A value of two knots or more; its share is that between them and less than two more, and the most is assumed.
    """
    cuts = np.flatnonzero(np.diff(knots)) + 1
    runs = [(int(a), int(b) - 1) for a, b in pairwise([0, *cuts, len(knots)]) if b - a > 1]
    chosen: list[tuple[int, int]] = []
    rest = len(knots) - 1  # between knots
    covered = 0
    for first, last in sorted(runs, key=lambda run: (run[0] - run[1], run)):
        left = bins - len(chosen)
        all_of_it = covered + last + 1 - first == len(knots)
        if (last - first + 2) * left <= rest or left == 0 or (left == 1 and not all_of_it):
            break
        chosen.append((first, last))
        rest -= last - first
        covered += last + 1 - first
    return sorted(chosen)


def _deal(gaps: list[tuple[int, int]], bins: int) -> list[int]:
    """Bins of each gap: one where there are rows, largest gaps first, then one between any two frequent values, and
    the others by the share of the rows."""
    inside = range(1, len(gaps) - 1)  # gaps with a frequent value on both sides: one step apart, they hold no knot
    rows = [last - first if last - first > (number in inside) else 0 for number, (first, last) in enumerate(gaps)]
    dealt = [0] * len(gaps)
    inner = [number for number in inside if not rows[number]]
    filled = sorted((number for number in range(len(gaps)) if rows[number]), key=lambda number: (-rows[number], number))
    for number in (filled + inner)[:bins]:
        dealt[number] = 1
    left, total = bins - sum(dealt), sum(rows)
    if left and total:
        exact = [left * share / total for share in rows]
        more = [int(x) for x in exact]
        for number in sorted(filled, key=lambda number: (more[number] - exact[number], number))[: left - sum(more)]:
            more[number] += 1
        dealt = [a + b for a, b in zip(dealt, more)]
    return dealt


def _even(
    knots: np.ndarray, first: int, last: int, bins: int, low: float = -np.inf, high: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """The inner borders and values of `bins` bins with equal shares of the rows from one knot to another, those at or
    above `low` and below `high`."""
    known = np.linspace(0, 1, len(knots))
    rows = np.interp(np.linspace(known[first], known[last], _ROWS_PER_BIN * bins), known, knots)
    rows = rows[(rows >= low) & (rows < high)]
    if not len(rows):
        rows = np.array([(knots[first] + knots[last]) / 2])
    edges = np.quantile(rows, np.linspace(0, 1, bins + 1))
    borders = edges[1:-1]
    index = np.searchsorted(borders, rows, side="right")
    count = np.bincount(index, minlength=bins)
    total = np.bincount(index, weights=rows, minlength=bins)
    middle = (edges[:-1] + edges[1:]) / 2  # of bins that no row falls in
    return borders, np.where(count > 0, total / np.maximum(count, 1), middle)


def _around(value: float) -> tuple[float, float]:
    """The least number that is this value as float32, and the least above it that is not."""
    here = np.float32(value)
    down, up = (np.float64(np.nextafter(here, np.float32(to))) for to in (-np.inf, np.inf))
    return (np.float64(here) + down) / 2, (np.float64(here) + up) / 2
