"""Chooses what the report shows of the actions: traces over whole recordings, a scatter, and single slices.

Shape suffixes: A action dimensions, H steps of a chunk, n points.
"""

from typing import Any

import numpy as np

from mmoe.evaluation.actions import Chunks
from mmoe.schema.modality import Modality
from mmoe.training.run import Run

TRACES, POINTS, SLICES = 3, 600, 4  # by source


def examples(run: Run, chunks: Chunks, predicted: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return examples of the actions of `chunks` and of those `predicted`, by source and in its own units.

    Each source has the `names` of its action dimensions A, and

    - `traces` of its longest held-out recordings: `true` and `predicted` [n, A], the first step of every chunk, over
      `x` [n] in the unit `axis`: clip time, or where a recording was cut into samples the number of the chunk;
    - `scatter`: `true` and `predicted` [n, A] of the first steps of a seeded choice of chunks;
    - `slices`: a few chunks of different samples, `true` and `predicted` [H, A], with their place in the shards.
    """
    found = {}
    for number in np.unique(chunks.source).tolist():
        name = run.sources.names[number]
        mine = np.flatnonzero(chunks.source == number)
        columns, tokenizer = run.tokenizers.dims[Modality.ACTION].columns[name], run.tokenizers.actions[name]
        true, guess = (tokenizer.denormalize(x[mine][:, :, columns]) for x in (chunks.target, predicted))
        inside = np.all(chunks.mask[mine][:, 0, columns], axis=1)  # the first step was logged
        recordings: dict[str, list[int]] = {}
        samples: dict[tuple[int, ...], list[int]] = {}
        for at, item in enumerate(mine.tolist()):
            if inside[at]:
                recordings.setdefault(chunks.recording[item], []).append(at)
                samples.setdefault(chunks.keys[item][:3], []).append(at)
        rng = np.random.default_rng((run.config.training.seed, number))
        some = np.sort(rng.permutation(np.flatnonzero(inside))[:POINTS])
        longest = sorted(recordings, key=lambda name: (-len(recordings[name]), name))
        chosen = [list(samples.values())[number] for number in rng.permutation(len(samples))[:SLICES]]
        found[name] = {
            "names": list(tokenizer.names),
            "traces": [_trace(name, recordings[name], chunks, mine, true, guess) for name in longest[:TRACES]],
            "scatter": {"true": true[some, 0].tolist(), "predicted": guess[some, 0].tolist()},
            "slices": [_slice(items[len(items) // 2], chunks, mine, true, guess) for items in chosen],
        }
    return found


def _trace(
    recording: str, items: list[int], chunks: Chunks, mine: np.ndarray, true: np.ndarray, guess: np.ndarray
) -> dict[str, Any]:
    chosen = mine[items]
    whole = len({chunks.keys[item][:3] for item in chosen}) == 1
    seconds = (chunks.time_ns[chosen] - chunks.time_ns[chosen[0]]) / 1e9
    return {
        "recording": recording,
        "axis": "clip time, s" if whole else "chunk",
        "x": seconds.tolist() if whole else list(range(len(items))),
        "true": true[items, 0].tolist(),
        "predicted": guess[items, 0].tolist(),
    }


def _slice(at: int, chunks: Chunks, mine: np.ndarray, true: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    _, shard, row, chunk = chunks.keys[mine[at]]
    return {
        "recording": chunks.recording[mine[at]],
        "shard": shard,
        "row": row,
        "chunk": chunk,
        "true": true[at].tolist(),
        "predicted": guess[at].tolist(),
    }
