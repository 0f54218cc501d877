"""Fits the three predictors an action error stands beside on the training split; none of them sees an image.

Shape suffixes: M chunks, H steps of a chunk, A action dimensions, F features.
"""

import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.evaluation.actions import Chunks, align, hold_last, places, read_chunks, training_means
from mmoe.evaluation.features import FeatureRows
from mmoe.evaluation.ridge import Ridge, fit_ridge
from mmoe.files import write_atomically, writes
from mmoe.hashing import canonical_json
from mmoe.schema.modality import Modality
from mmoe.training.run import Run

MOST_DOCUMENTS = 20_000  # training documents of a source that the ridge is fitted on: a seeded choice if there are more
MOST_FEATURES = 1024  # the most frequent ones are kept
FILE = "baselines.npz"  # in the run's folder: they follow from the data alone, so one fit serves every evaluation

_VERSION = 1  # of the features and of the fit
_ARRAYS = ("mean", "std", "weights", "intercept")


@dataclass(frozen=True)
class Baselines:
    """Holds the baselines by source: `means` [H, A], and `ridges` with the feature keys [F] that they read.

    `record` says what was fitted.
    """

    means: dict[str, np.ndarray]
    ridges: dict[str, tuple[np.ndarray, Ridge]]
    record: dict[str, Any]

    @classmethod
    def from_run(cls, run: Run) -> "Baselines":
        """Read the baselines that an earlier evaluation left in the run's folder, or fit them if its data differs."""
        path, key = run.folder / FILE, _key(run)
        if path.is_file():
            try:
                stored, baselines = _load(path)
                if stored == key:
                    return baselines
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                pass  # cut off while it was written: it is fitted again below
        baselines = cls.fit(run)
        with writes(path):
            run.folder.mkdir(parents=True, exist_ok=True)
        baselines.save(path, key)
        return baselines

    @classmethod
    def fit(cls, run: Run) -> "Baselines":
        """Fit the baselines of every source on the training split of the run."""
        chunks = read_chunks(run.sources, run.tokenizers, "train")
        seed = run.config.training.seed
        means = training_means(chunks)
        ridges, record = {}, {}
        for number in np.unique(chunks.source).tolist():
            name = run.sources.names[number]
            rows = read_features(run, [name], split="train", most_documents=MOST_DOCUMENTS)
            mine = chunks.take(places(rows.parts, chunks))
            columns, features = rows.frequent(MOST_FEATURES)
            documents = np.unique(rows.parts[:, :3], axis=0, return_inverse=True)[1].reshape(-1)
            ridge = fit_ridge(rows.dense(columns), mine.target, mine.mask, documents, seed)
            ridges[name] = (columns, ridge)
            record[name] = {
                "penalty": ridge.penalty,
                "features": len(columns),
                "features_left_out": features - len(columns),
                "chunks": len(mine),
                "documents": int(documents.max()) + 1,
            }
        return cls({run.sources.names[n]: means[n] for n in np.unique(chunks.source).tolist()}, ridges, record)

    def predict(self, sources: list[str], features: FeatureRows, chunks: Chunks) -> dict[str, np.ndarray]:
        """Predict ``mean``, ``hold_last`` and ``ridge``, each [M, H, A], for `chunks`.

        `sources` names the sources by their number in `chunks`; `features` has a row a chunk.
        """
        means = np.zeros((len(sources), *chunks.target.shape[1:]))
        ridge = np.full(chunks.target.shape, np.nan)
        for number, name in enumerate(sources):
            if name not in self.ridges:
                continue
            means[number] = self.means[name]
            columns, model = self.ridges[name]
            mine = chunks.source == number
            ridge[mine] = align(features.parts, model.predict(features.dense(columns)), chunks)[mine]
        return {"mean": means[chunks.source], "hold_last": hold_last(chunks, means), "ridge": ridge}

    def save(self, path: Path, key: str) -> None:
        """Write the baselines to `path`; `key` is a digest of what they were fitted on."""
        arrays: dict[str, Any] = {}
        for number, (name, (columns, ridge)) in enumerate(self.ridges.items()):
            arrays |= {f"means.{number}": self.means[name], f"columns.{number}": columns}
            arrays |= {f"{item}.{number}": getattr(ridge, item) for item in _ARRAYS}
        header = json.dumps({"key": key, "record": self.record})
        content = io.BytesIO()
        np.savez(content, header=np.array(header), **arrays)
        with writes(path):
            write_atomically(path, content.getvalue())


def read_features(run: Run, only: list[str], **choices: Any) -> FeatureRows:
    """Read the features of every chunk of the sources `only` without opening an image.

    `choices` are those of `Run.heldout`.
    """
    rows, data = FeatureRows(), run.config.data
    if data.workers:  # nothing but decoding to do: every core may
        data = data.model_copy(update={"workers": len(os.sched_getaffinity(0))})
        run = replace(run, config=run.config.model_copy(update={"data": data}))
    for batch in run.heldout(isolated=False, only=only, skip=frozenset({Modality.VISION}), **choices):
        rows.add(batch)
    return rows


def _load(path: Path) -> tuple[str, Baselines]:
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
        means, ridges = {}, {}
        for number, (name, record) in enumerate(header["record"].items()):
            means[name] = file[f"means.{number}"]
            mean, std, weights, intercept = (file[f"{item}.{number}"] for item in _ARRAYS)
            ridges[name] = (file[f"columns.{number}"], Ridge(mean, std, weights, intercept, record["penalty"]))
    return header["key"], Baselines(means, ridges, header["record"])


def _key(run: Run) -> str:
    """A digest of all that the fit depends on: data, tokenizers, seed and the definition of the features."""
    config, tokenizers = run.config, run.tokenizers
    parts = [
        _VERSION,
        config.data.model_dump(mode="json", exclude={"workers", "prefetch"}),
        config.tokenizers.model_dump(mode="json"),
        config.training.seed,
        tokenizers.text.fingerprint,
        tokenizers.audio.fingerprint if tokenizers.audio else None,
        {name: manifest.model_dump(mode="json") for name, manifest in run.sources.manifests.items()},
    ]
    return hashlib.sha256(canonical_json(parts)).hexdigest()
