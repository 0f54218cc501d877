"""Clusters of points: k-means, and the bounded sample of rows it is fitted to."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids [K, D] of points [N, D]: Lloyd's algorithm from a k-means++ start."""
    return lloyd(points, spread_points(points, clusters, generator))


def spread_points(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose K of the points [N, D], far from each other by the k-means++ rule (Arthur and Vassilvitskii 2007)."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    distance = (points - points[chosen]).square().sum(1)
    for _ in range(clusters - 1):
        # Where there are fewer distinct points than clusters, the rest of the clusters repeat a point.
        weights = distance if distance.max() > 0 else torch.ones_like(distance)
        chosen = torch.cat([chosen, torch.multinomial(weights.double(), 1, generator=generator)])
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def lloyd(points: Tensor, centroids: Tensor, iterations: int = 50) -> Tensor:
    """Centroids [K, D] moved to the mean of their points until no point changes its cluster.

    A cluster that loses all its points moves to the point furthest from its centroid.
    """
    assignment = None
    for _ in range(iterations):
        previous, assignment = assignment, nearest_centroid(points, centroids)
        if previous is not None and torch.equal(previous, assignment):
            break
        sizes = torch.bincount(assignment, minlength=len(centroids))
        sums = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, assignment, points.double())
        centroids = (sums / sizes.clamp_min(1)[:, None]).float()
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            error = (points - centroids[assignment]).square().sum(1)
            centroids[empty] = points[error.topk(len(empty)).indices]
    return centroids


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Index i64 [N] of the centroid [K, D] nearest to each point [N, D]."""
    norms = centroids.square().sum(1)
    chunks = [torch.addmm(norms, part, centroids.T, alpha=-2).argmin(1) for part in points.split(8192)]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int64)


def sample_rows(batches: Iterable[np.ndarray], limit: int, seed: int) -> np.ndarray:
    """Draw a uniform sample of at most `limit` rows of all batches, in their order, in bounded memory."""
    random = np.random.default_rng(seed)
    kept, keys = [], []
    for rows in batches:
        kept.append(rows)
        keys.append(random.random(len(rows)))
        if sum(map(len, keys)) > 2 * limit:
            kept, keys = _smallest(kept, keys, limit)
    if not kept:
        return np.zeros((0, 1), dtype=np.float32)
    return _smallest(kept, keys, limit)[0][0]


def _smallest(rows: list[np.ndarray], keys: list[np.ndarray], limit: int) -> tuple[list, list]:
    row, key = np.concatenate(rows), np.concatenate(keys)
    order = np.sort(np.argpartition(key, limit)[:limit]) if len(key) > limit else np.arange(len(key))
    return [row[order]], [key[order]]
