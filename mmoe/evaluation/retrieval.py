"""Measures retrieval between the two sides of isolated pairs, in pools of fixed size.

Shape suffixes: P pairs, E embedding width, n queries and as many candidates.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe.evaluation.confidence import mean_low, wilson_low
from mmoe.losses.info_nce import TIE_EPS
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality

POOL, POOLS = 64, 10
TOP = (1, 5)


@dataclass(frozen=True)
class PairEmbeddings:
    """Holds the embeddings of the two sides of P held-out pairs: `text`, `other` [P, E].

    `text_hash` [P] names each caption, `kind` [P] is the modality of the side that is not text, `source` [P] the number
    of the source.
    """

    text: np.ndarray
    other: np.ndarray
    text_hash: np.ndarray
    kind: np.ndarray
    source: np.ndarray

    @classmethod
    def from_batch(cls, batch: PackedBatch, left: Tensor, right: Tensor) -> "PairEmbeddings":
        """Make the pairs of `batch` from `left` and `right` [P, E], the L2-normalized embeddings of their two sides."""
        text_left = (batch.pairs.modality[:, 0] == Modality.TEXT)[:, None]
        kinds = torch.where(text_left[:, 0], batch.pairs.modality[:, 1], batch.pairs.modality[:, 0])
        return cls(
            torch.where(text_left, left, right).double().cpu().numpy(),
            torch.where(text_left, right, left).double().cpu().numpy(),
            batch.pairs.text_hash.cpu().numpy(),
            kinds.cpu().numpy(),
            batch.source.flatten()[batch.pairs.span[:, 0, 0]].cpu().numpy(),
        )


def report_retrieval(parts: list[PairEmbeddings], sources: list[str], seed: int) -> dict[str, Any]:
    """Return the recall of each "<source>/<kind>-text" under `by`, and at the top the entry with most captions.

    Images come before audio clips. Where no source has `POOL` different captions, the top has null figures and the
    `reason`.
    """
    by: dict[str, dict[str, Any]] = {}
    if parts:
        text, other, hashes, kinds, numbers = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(PairEmbeddings)
        )
        for kind, source in sorted({(int(k), int(s)) for k, s in zip(kinds, numbers)}):
            mine = (kinds == kind) & (numbers == source)
            name = f"{sources[source]}/{Modality(kind).name.lower()}-text"
            by[name] = recall(text[mine], other[mine], hashes[mine], seed)
    full = [name for name, entry in by.items() if entry["r1"] is not None]
    chosen = max(full, key=lambda name: (name.endswith("vision-text"), by[name]["captions"]), default=None)
    if chosen is not None:
        top = {"of": chosen, **{key: by[chosen][key] for key in ("r1", "r1_low", "r5", "pool", "chance")}}
    else:
        reason = f"no source has {POOL} held-out pairs with different captions" if by else "no held-out pairs"
        top = {"of": None, "r1": None, "r1_low": None, "r5": None, "pool": POOL, "reason": reason}
    return {**top, "by": by}


def recall(text: np.ndarray, other: np.ndarray, hashes: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure recall in seeded pools of `POOL` pairs whose captions all differ, the mean of both directions.

    `text`, `other` [P, E] are the sides' embeddings, `hashes` [P] names each caption. `r1_low` is the lower of
    two 95 % bounds: Student's t over the pools, and Wilson's with as many trials as different pairs were asked
    for (pools share pairs, so pools times queries would count the same evidence repeatedly). With fewer captions
    the figures are null, and `smaller_pool` holds those of one pool of every caption there is.
    """
    captions = np.unique(hashes)
    entry: dict[str, Any] = {"pairs": len(hashes), "captions": len(captions), "pool": POOL}
    if len(captions) >= POOL:
        return entry | _pools(text, other, hashes, captions, POOL, seed)
    reason = f"{len(hashes)} held-out pairs have {len(captions)} different captions, a pool needs {POOL}"
    smaller = None
    if len(captions) > 1:
        smaller = {"pool": len(captions)} | _pools(text, other, hashes, captions, len(captions), seed)
    return entry | {"r1": None, "r1_low": None, "r5": None, "reason": reason, "smaller_pool": smaller}


def hits(text: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return [directions, TOP, n] bool: query i finds its partner among the first 1 and 5 of the n candidates.

    A candidate that ties with the partner, but for rounding, counts as before it: equal embeddings find nothing in any
    layout, nor does NaN.
    """
    scores = text @ other.T
    tie = TIE_EPS * np.finfo(scores.dtype).eps
    found = []
    for table in (scores, scores.T):
        before = (~(table < table.diagonal()[:, None] - tie)).sum(1) - 1
        found.append([before < top for top in TOP])
    return np.array(found)


def _pools(
    text: np.ndarray, other: np.ndarray, hashes: np.ndarray, captions: np.ndarray, size: int, seed: int
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    by_caption = {h: np.flatnonzero(hashes == h) for h in captions.tolist()}
    figures, asked = [], set()
    for _ in range(POOLS):
        chosen = rng.choice(captions, size, replace=False)
        pool = np.array([rng.choice(by_caption[h]) for h in chosen.tolist()])
        asked.update(pool.tolist())
        figures.append(hits(text[pool], other[pool]).mean(2))
    table = np.array(figures)  # [POOLS, directions, TOP]
    means = table.mean((0, 1))
    low = min(mean_low(table[:, :, 0].mean(1)), wilson_low(float(means[0]), len(asked)))
    return {
        "r1": float(means[0]),
        "r1_low": max(0.0, low),
        "r5": float(means[1]),
        "r1_by_direction": {
            "text to other": float(table[:, 0, 0].mean()),
            "other to text": float(table[:, 1, 0].mean()),
        },
        "chance": 1.0 / size,
        "pools": POOLS,
        "different_pairs": len(asked),
    }
