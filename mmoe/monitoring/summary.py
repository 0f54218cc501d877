"""Sums up a run in one small file, `summary.json`, from its records and evaluations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.errors import DataError
from mmoe.files import write_atomically, writes
from mmoe.monitoring.reader import RunReader, read_lines

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunRecords:
    """Holds what a run's folder has: the reader of its records, and its evaluations by name.

    ``evaluations`` has "" for the plain one, and "shuffle-vision", "blank-audio", "on-<folder>" for the others.
    """

    reader: RunReader
    evaluations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunRecords":
        """Read the evaluations in a run's folder. Raises DataError for a file that is no evaluation."""
        evaluations = {
            file.stem.removeprefix("evaluation").removeprefix("-"): _evaluation(file)
            for file in folder.glob("evaluation*.json")
        }
        return cls(RunReader(folder), dict(sorted(evaluations.items())))

    @property
    def plain(self) -> dict[str, Any]:
        """The evaluation without ablation; empty where there is none yet."""
        return self.evaluations.get("", {})


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); delete it, or evaluate again") from error
    if not isinstance(evaluation, dict):
        raise DataError(f"{path} holds a {type(evaluation).__name__}, no evaluation; delete it, or evaluate again")
    return evaluation


def write_summary(folder: Path) -> dict[str, Any]:
    """Write ``summary.json`` into the run's `folder` and return it; figures that were not measured are null."""
    summary = summarize(RunRecords.read(folder))
    with writes(folder / SUMMARY):
        write_atomically(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def summarize(records: RunRecords) -> dict[str, Any]:
    """Sum up a run: rates over all its steps, losses at its end. Raises DataError where nothing was trained."""
    reader, plain = records.reader, records.plain
    columns, last = reader.columns("peak_memory_bytes", "mfu", "positions", "positions_per_second"), reader.last()
    # By the names of before where the run ended before they changed.
    chosen = last.get("slots_routed", last.get("expert_choices", 0))
    dropped = last.get("slots_dropped", last.get("expert_choices_dropped", 0))
    summary = {
        "steps": last["step"],
        "positions": last["positions"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "packing_efficiency": last["tokens"] / last["positions"],
        **{key: plain.get(key) for key in ("action_mse", "action_mse_baselines")},
        "retrieval": plain.get("retrieval") or dict.fromkeys(("r1", "r1_low", "r5", "pool")),
        **{key: plain.get(key) for key in ("val_ce", "unigram_ce", "ce_by_source", "ranking")},
        "drop_rate": dropped / chosen if chosen else None,
        "resume_exact": resume_exact(reader),
        "tokens_per_second": last["tokens"] / last["wall_seconds"],
        "positions_per_second": last["positions"] / last["wall_seconds"],
        "mfu": _mean_mfu(columns),
        "mfu_peak_flops": last.get("mfu_peak_flops"),
        "peak_memory_bytes": int(np.nanmax(columns["peak_memory_bytes"])),
        "wall_seconds": last["wall_seconds"],
    }
    for name, evaluation in records.evaluations.items():
        if evaluation["ablation"] and not evaluation["shards"]:
            suffix = name.replace("-", "_")
            summary[f"action_mse_{suffix}"] = evaluation["action_mse"]
            summary[f"retrieval_r1_{suffix}"] = evaluation["retrieval"]["r1"]
    return summary


def _mean_mfu(columns: dict[str, np.ndarray]) -> float | None:
    """Give the mean over the time of all steps; None where the peak is not known."""
    seconds = np.diff(columns["positions"], prepend=0) / columns["positions_per_second"]
    known = ~np.isnan(columns["mfu"])
    return float(np.average(columns["mfu"][known], weights=seconds[known])) if known.any() else None


def resume_exact(reader: RunReader) -> bool | None:
    """Return whether steps that were undone by a resume and done again came out bit for bit the same.

    False when any loss, gradient norm or digest (of weights and optimizer states) differs. Losses are compared where
    both are means over the same steps (`steps_averaged`): a record before may have stood elsewhere. True needs a digest
    that was recorded both times; None when no step was done twice, or none of those has such a digest. Steps after a
    change on record (`changes.jsonl`) are left out: they were done otherwise on purpose.
    """
    names = ("loss", "grad_norm", "steps_averaged")
    undone = reader.undone(*names)
    path = reader.folder / "changes.jsonl"
    changed = min((line["step"] for line in read_lines(path)), default=np.inf) if path.is_file() else np.inf
    undone = {name: column[undone["step"] <= changed] for name, column in undone.items()}
    if not len(undone["step"]):
        return None
    done = reader.columns(*names)
    both = {name: np.concatenate([undone[name], done[name]]) for name in ("step", *names)}
    both["steps_averaged"] = np.nan_to_num(both["steps_averaged"], nan=1)  # before there were means
    for name, same in (("loss", ("step", "steps_averaged")), ("grad_norm", ("step",))):
        present = ~np.isnan(both[name])
        keys = [both[key][present] for key in same]
        order = np.lexsort(keys)
        twice = np.all([np.diff(key[order]) == 0 for key in keys], axis=0)
        if (twice & (np.diff(both[name][present][order]) != 0)).any():
            return False
    digests: dict[int, str] = {}
    proven = False
    for step, digest in reader.notes("digest"):
        if step in digests and step <= changed:
            if digests[step] != digest:
                return False
            proven = True
        digests[step] = digest
    return True if proven else None
