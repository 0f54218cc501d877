"""Fits a ridge regression of the action on every non-visual input that the model has read before it.

A model that beats it has found something in the images (or in the order of what it heard) that no linear map
of the other inputs gives; `features.py` lists them. Features are standardized; the penalty is the one, of
`PENALTIES`, with the least error on a held-apart share of the training documents; then all of them are fitted.

Shape suffixes: M chunks, F features, H steps, A dimensions.
"""

from dataclasses import dataclass

import numpy as np

PENALTIES = 10.0 ** np.arange(-6, 3)  # relative to the number of chunks, as features have unit variance
HELD_APART = 0.2


@dataclass(frozen=True)
class Ridge:
    """Holds a fitted linear map: `predict(X) = (X - mean) / std @ weights + intercept`.

    `weights` [F, H, A], `intercept` [H, A].
    """

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    penalty: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predict the actions [M, H, A] from `features` [M, F]."""
        standard = (features - self.mean) / self.std
        return np.einsum("mf,fha->mha", standard, self.weights, optimize=True) + self.intercept


def fit_ridge(features: np.ndarray, target: np.ndarray, mask: np.ndarray, document: np.ndarray, seed: int) -> Ridge:
    """Fit a ridge regression on `features` [M, F] and `target` [M, H, A], of which those in `mask` [M, H, A] count.

    `document` [M] is what the held-apart share is drawn by. A feature that does not vary gets no weight.
    """
    mean, std = features.mean(0), features.std(0)
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, np.inf)
    standard = (features - mean) / std
    documents = np.unique(document)
    apart = np.random.default_rng(seed).permutation(documents)[: round(HELD_APART * len(documents))]
    held = np.isin(document, apart)
    penalty = PENALTIES[len(PENALTIES) // 2]
    if held.any() and not held.all():
        errors = np.zeros(len(PENALTIES))
        tried = _solve(standard[~held], target[~held], mask[~held], PENALTIES)
        for number, (weights, intercept) in enumerate(zip(*tried)):
            predicted = np.einsum("mf,fha->mha", standard[held], weights, optimize=True) + intercept
            errors[number] = np.where(mask[held], (predicted - target[held]) ** 2, 0.0).sum()
        penalty = PENALTIES[int(errors.argmin())]
    weights, intercept = _solve(standard, target, mask, np.array([penalty]))
    return Ridge(mean, std, weights[0], intercept[0], float(penalty))


def _solve(x: np.ndarray, y: np.ndarray, mask: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [penalties, F, H, A] and intercepts [penalties, H, A] of the masked, centered normal equations."""
    features, outputs = x.shape[1], y.shape[1:]
    columns, present = y.reshape(len(y), -1), mask.reshape(len(y), -1)
    weights = np.zeros((len(penalties), features, columns.shape[1]))
    intercepts = np.zeros((len(penalties), columns.shape[1]))
    patterns, group = np.unique(present, axis=1, return_inverse=True)
    for number in range(patterns.shape[1]):  # outputs that are there in the same rows share one decomposition
        rows, mine = patterns[:, number], np.flatnonzero(group.reshape(-1) == number)
        if not rows.any():
            continue
        center_x, center_y = x[rows].mean(0), columns[rows][:, mine].mean(0)
        part = x[rows] - center_x
        values, vectors = np.linalg.eigh(part.T @ part / len(part))
        moment = vectors.T @ (part.T @ (columns[rows][:, mine] - center_y) / len(part))
        for at, penalty in enumerate(penalties):
            solution = vectors @ (moment / (np.maximum(values, 0) + penalty)[:, None])
            weights[at][:, mine] = solution
            intercepts[at, mine] = center_y - center_x @ solution
    return weights.reshape(-1, features, *outputs), intercepts.reshape(-1, *outputs)
