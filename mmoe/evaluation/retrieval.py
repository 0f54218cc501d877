"""Retrieval between the two sides of isolated pairs, in pools of fixed size."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe.evaluation.bounds import mean_low, wilson_low
from mmoe.schema.batch import PackedBatch
from mmoe.schema.sample import Modality

POOL, POOLS = 64, 10
TOP = (1, 5)


@dataclass
class PairEmbeddings:
    """Embeddings of both sides of every held-out pair."""

    sources: list[str]
    _text: list[np.ndarray] = field(default_factory=list)
    _other: list[np.ndarray] = field(default_factory=list)
    _hash: list[np.ndarray] = field(default_factory=list)
    _kind: list[np.ndarray] = field(default_factory=list)  # modality of the side that is not text
    _source: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: PackedBatch, left: Tensor, right: Tensor) -> None:
        """`left`, `right` [P, E]: the embeddings of the two sides of `batch.pairs`, L2-normalised."""
        text_left = (batch.pairs.modality[:, 0] == Modality.TEXT)[:, None]
        kinds = torch.where(text_left[:, 0], batch.pairs.modality[:, 1], batch.pairs.modality[:, 0])
        self._text.append(torch.where(text_left, left, right).double().cpu().numpy())
        self._other.append(torch.where(text_left, right, left).double().cpu().numpy())
        self._hash.append(batch.pairs.text_hash.cpu().numpy())
        self._kind.append(kinds.cpu().numpy())
        self._source.append(batch.source.flatten()[batch.pairs.span[:, 0, 0]].cpu().numpy())

    def report(self, seed: int) -> dict[str, Any]:
        """`by` "<source>/<kind>-text", and at the top the entry with most captions (pictures before sounds).

        Where no source has `POOL` different captions, the top has null figures and the `reason`.
        """
        by: dict[str, dict[str, Any]] = {}
        if self._text:
            text, other, hashes, kinds, sources = (
                np.concatenate(parts) for parts in (self._text, self._other, self._hash, self._kind, self._source)
            )
            for kind, source in sorted({(int(k), int(s)) for k, s in zip(kinds, sources)}):
                mine = (kinds == kind) & (sources == source)
                name = f"{self.sources[source]}/{Modality(kind).name.lower()}-text"
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
    """Recall in seeded pools of `POOL` pairs whose captions all differ, the mean of both directions.

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
    """[directions, TOP, n]: whether query i finds its partner among the first 1 and 5 of the n candidates.

    A candidate that ties with the partner counts as before it, so equal embeddings find nothing.
    """
    scores = text @ other.T
    found = []
    for table in (scores, scores.T):
        before = (table >= table.diagonal()[:, None]).sum(1) - 1
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
