"""Measures for `mmoe evaluate` what a run can do on recordings it has never seen, and what of that without sight."""

import json
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.addresses import check_address
from mmoe.config.load import flatten
from mmoe.data.config import DataConfig
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation import ablation
from mmoe.evaluation.ablation import Ablation
from mmoe.evaluation.actions import align, chunk_starts, error_tables, places, predict_actions, read_chunks
from mmoe.evaluation.baselines import Baselines, read_features
from mmoe.evaluation.categories import CategoryScores
from mmoe.evaluation.cross_entropy import TokenScores
from mmoe.evaluation.examples import examples
from mmoe.evaluation.features import FeatureRows
from mmoe.evaluation.inference import MeasureProgress, inference
from mmoe.evaluation.ranking import rank_candidates
from mmoe.evaluation.retrieval import POOL, POOLS, PairEmbeddings, report_retrieval
from mmoe.files import write_atomically, writes
from mmoe.runtime.launch import rank_zero_first
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.schema.rig import Rig
from mmoe.training.run import Run

logger = logging.getLogger(__name__)


def evaluate(
    run: Run,
    *,
    shards: str | None = None,
    blank: Modality | None = None,
    shuffle: Modality | None = None,
    progress: MeasureProgress | None = None,
) -> dict[str, Any] | None:
    """Measure `run` on its held-out split, or on that of the prepared folder `shards`; returns what it writes.

    The model is measured as it is spread: with a process group all ranks call this, and rank 0 alone writes and returns
    the result; the others return None once it has. `blank` zeroes a modality, `shuffle` takes it from another held-out
    recording. Writes ``evaluation.json`` into the run's folder, ``evaluation-blank-vision.json`` and the like under an
    ablation, and ``evaluation-on-<folder>...json`` for other shards. Errors of actions are in normalized units, CE in
    nats. `progress` is told of every round of batches.
    Raises ConfigError for choices that exclude each other, DataError where nothing is held out.
    """
    if blank is not None and shuffle is not None:
        raise ConfigError("--blank and --shuffle exclude each other; evaluate twice to see both")
    started = time.perf_counter()
    view = run if shards is None else _other_shards(run, shards)
    not_evaluated = {
        name: "no held-out samples" for name, manifest in view.sources.manifests.items() if not manifest.holds_out
    }
    donors = None
    if blank is not None:
        donors = ablation.blank(blank)
    if shuffle is not None:
        donors = ablation.shuffle(view.sources, "heldout", shuffle, run.config.training.seed)
        not_evaluated |= donors.left_out
    only = [name for name in view.sources.names if name not in not_evaluated]
    if not only:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_evaluated.items())
        raise DataError(
            f"{run.folder}: nothing can be evaluated ({reasons}); prepare a source with a held-out split "
            "(prepare.heldout_share)"
        )
    found = _Measured.from_run(view, only, donors.ablation if donors else None, progress)
    result: dict[str, Any] = {}

    def conclude() -> None:  # fits baselines, so it may take long
        result.update(
            {
                "run": str(run.folder),
                "shards": shards,
                "ablation": donors.record() if donors else None,
                "samples": _counted(view.sources, found.documents),
                "max_documents": run.config.evaluation.max_documents,
                "not_evaluated": not_evaluated,
                **found.tokens.report(),
                **_actions(run, view, found.actions, found.features),
                "categories": found.categories.report(),
                "retrieval": report_retrieval(found.pairs, view.sources.names, run.config.training.seed),
                "ranking": found.ranking,
                "seconds": time.perf_counter() - started,
            }
        )
        path = run.folder / file_name(shards, blank, shuffle)
        with writes(path):
            write_atomically(path, json.dumps(result, indent=1))
        if broken := sorted(key for key, value in flatten(result).items() if _broken(value)):
            logger.warning(f"{path}: {', '.join(broken[:5])} is not finite: the weights of {run.folder} are broken")

    rank_zero_first(conclude)
    return result if run.ranks.first else None


@dataclass(frozen=True)
class _Measured:
    """What the model said, brought together; on ranks other than the first, lists are empty.

    `actions` has by batch the document parts [m, 4] of its chunks and the predictions [m, H, A]. `features` are those
    of every chunk, where rank 0 has seen all batches with all their vectors; None where they must be read.
    """

    documents: set[tuple[int, int, int]]
    tokens: TokenScores
    categories: CategoryScores
    actions: list[tuple[np.ndarray, np.ndarray]]
    features: FeatureRows | None
    pairs: list[PairEmbeddings]
    ranking: dict[str, dict[str, Any]]

    @classmethod
    def from_run(
        cls, run: Run, only: list[str], taken: Ablation | None, progress: MeasureProgress | None
    ) -> "_Measured":
        """Run the model over everything that is held out of the sources `only`; all ranks together."""
        tokens = TokenScores(run.tokenizers.vocabulary, run.sources.names)
        categories = CategoryScores(run.tokenizers, run.sources.manifests)
        actions: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        pairs: dict[tuple[int, int], PairEmbeddings] = {}
        # The baselines are those of the whole data, whatever the model may see of it.
        sees_all = run.ranks.first and run.ranks.speaks and run.ranks.replicas == 1
        features = FeatureRows() if sees_all and (taken is None or taken.modality is Modality.VISION) else None
        with inference(run, progress) as model:
            heldout = run.heldout(isolated=False, only=only, stand_in=taken)
            for number, batch, hidden in model.outputs(heldout, "tokens and actions"):
                tokens.add(batch, *model.label_log_probabilities(hidden, batch))
                categories.add(model, hidden, batch)
                starts, parts = chunk_starts(batch)
                if len(starts):
                    actions[number] = parts, predict_actions(model, hidden, batch, starts, parts)
                    if features is not None:
                        features.add(batch)
            tokens.sum_over(model.total)
            categories.sum_over(model.total)
            for at, (name, most) in enumerate(_enough_pairs(run.sources, only).items()):
                isolated = run.heldout(isolated=True, only=[name], stand_in=taken, most_documents=most)
                for number, batch, hidden in model.outputs(isolated, f"retrieval, {name}"):
                    sides = run.model.contrast(hidden, batch.pairs, batch.modality)
                    pairs[at, number] = PairEmbeddings.from_batch(batch, *sides)
            ranking = rank_candidates(model, only, taken)
            gathered = model.in_order(actions), features, model.in_order(pairs)
            return cls(heldout.documents, tokens, categories, *gathered, ranking)


def _broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def file_name(shards: str | None = None, blank: Modality | None = None, shuffle: Modality | None = None) -> str:
    """Return the name of the file that `evaluate` writes with these choices in the run's folder."""
    name = "evaluation" if shards is None else f"evaluation-on-{Path(shards).name}"
    for mode, modality in (("blank", blank), ("shuffle", shuffle)):
        name += f"-{mode}-{modality.name.lower()}" if modality is not None else ""
    return f"{name}.json"


def _actions(
    run: Run,
    view: Run,
    measured: list[tuple[np.ndarray, np.ndarray]],
    features: FeatureRows | None,
) -> dict[str, Any]:
    """`action_mse`, `action_mse_baselines` and the tables behind them; null where the sources log no actions."""
    if not measured or not view.tokenizers.dims[Modality.ACTION].size:
        return {"action_mse": None, "action_mse_baselines": None, "actions": {}, "examples": {}}
    chunks = read_chunks(view.sources, view.tokenizers, "heldout")
    parts, predictions = (np.concatenate(column) for column in zip(*measured))
    predicted = align(parts, predictions, chunks)
    seen = np.unique(places(parts, chunks))  # not by NaN: what a broken model predicts counts, too
    chunks, predicted = chunks.take(seen), predicted[seen]
    baselines = Baselines.from_run(run)
    if features is None:
        acting = [view.sources.names[number] for number in np.unique(chunks.source)]
        features = read_features(view, acting)
    beside = baselines.predict(view.sources.names, features, chunks)
    names = view.tokenizers.dims[Modality.ACTION].names
    tables = error_tables({"model": predicted, **beside}, chunks, names, view.sources.names)
    overall = tables["all"]
    return {
        "action_mse": overall["model"],
        "action_mse_baselines": {who: overall[who] for who in beside},
        "actions": tables
        | {
            "chunks": len(chunks),
            "hold_last_without_history": int((~chunks.has_last).sum()),
            "ridge": baselines.record,
        },
        "examples": examples(view, chunks, predicted),
    }


def _other_shards(run: Run, shards: str) -> Run:
    """The run with one source: the prepared folder `shards`, read as the run's source of the same kind is."""
    check_address(shards)
    manifest = SourceManifest.load(shards, run.sources.storage.read)
    alike = {name: known for name, known in run.sources.manifests.items() if _content(manifest) == _content(known)}
    names = [name for name, known in alike.items() if _values(manifest) == _values(known)]
    if alike and not names:
        name = next(iter(alike))
        raise DataError(
            f"{shards}/source.json: its named values are {_values(manifest) or 'none'}, those of {name} in "
            f"{run.folder} {_values(alike[name]) or 'none'}; prepare it again with the option categories of {name}"
        )
    if not names:
        known = ", ".join(f"{name} ({manifest.kind})" for name, manifest in run.sources.manifests.items())
        raise DataError(
            f"{shards}/source.json: no source of {run.folder} is of kind {manifest.kind} with the same modalities, "
            f"cameras and dimension names, so nothing says how to read it; the run knows {known}"
        )
    source = run.config.data.sources[names[0]].model_copy(update={"shards": shards})
    data: DataConfig = run.config.data.model_copy(update={"sources": {names[0]: source}})
    sources = PreparedSources(data)
    # How often each named value was trained on is what the run's source says: the other may hold no training part.
    counts = run.sources.manifests[names[0]].categories
    sources.manifests[names[0]] = manifest.model_copy(update={"categories": counts})
    sources.check(run.tokenizers)
    return replace(run, config=run.config.model_copy(update={"data": data}), sources=sources)


def _content(manifest: SourceManifest) -> tuple[str, set[str], Rig, dict[str, tuple[str, ...]]]:
    """What two prepared folders must share to be read alike, beside named values: kind, modalities, rig, dimensions."""
    modalities = {group.modality for split in manifest.splits.values() for group in split.groups}
    return manifest.kind, modalities, manifest.rig, {name: stats.names for name, stats in manifest.vectors.items()}


def _values(manifest: SourceManifest) -> dict[str, list[str]]:
    """The values that the numbers 0, 1, ... of a dimension are named, by dimension."""
    return {name: list(counts) for name, counts in manifest.categories.items()}


def _enough_pairs(sources: PreparedSources, only: list[str]) -> dict[str, int]:
    """By source with pairs: how many of its held-out documents fill all pools of retrieval without repeating a pair."""
    documents = {}
    for files in sources.files("heldout"):
        if files.name not in only:
            continue
        indices = [ShardIndex.read(tar, sources.storage) for tar in files.tars]
        texts = [index.segments[index.segments["modality"] == Modality.TEXT] for index in indices]
        pairs = sum(int((text["pair"] >= 0).sum()) for text in texts)
        if pairs:
            documents[files.name] = math.ceil(POOL * POOLS * sum(map(len, indices)) / pairs)
    return documents


def _counted(sources: PreparedSources, documents: set[tuple[int, int, int]]) -> dict[str, dict[str, int]]:
    """By source: samples held out, and those that a sequence could hold."""
    seen = [document[0] for document in documents]
    return {
        name: {"held_out": manifest.splits["heldout"].samples, "evaluated": seen.count(number)}
        for number, (name, manifest) in enumerate(sources.manifests.items())
        if "heldout" in manifest.splits
    }
