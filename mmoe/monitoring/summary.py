"""`summary.json`: a run in one small file, from its metrics and evaluations."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.errors import DataError
from mmoe.files import write_atomically, writes

METRICS, SUMMARY = "metrics.jsonl", "summary.json"


@dataclass(frozen=True)
class RunRecords:
    """What a run's folder holds: every line of its metrics in the order written, and its evaluations by name.

    ``evaluations`` has "" for the plain one, and "shuffle-vision", "blank-audio", "on-<folder>" for the others.
    """

    lines: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunRecords":
        """Raises DataError where nothing was trained, and for a line that is not JSON (the last may be cut off)."""
        path = folder / METRICS
        if not path.is_file():
            raise DataError(f"{path} does not exist: {folder} has no step to report; train it first")
        lines, texts = [], path.read_text(encoding="utf-8").splitlines()
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                if number < len(texts):
                    raise DataError(f"{path}: line {number} is not JSON ({error}); remove that line") from error
        if not lines:
            raise DataError(f"{path} is empty: {folder} has no step to report; train it first")
        evaluations = {
            file.stem.removeprefix("evaluation").removeprefix("-"): _evaluation(file)
            for file in folder.glob("evaluation*.json")
        }
        return cls(lines, dict(sorted(evaluations.items())))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The last record of every step, by step: where a run went back, what it did then counts."""
        return [record for _, record in sorted({line["step"]: line for line in self.lines}.items())]

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
    """Write ``summary.json`` into the run's `folder` and return it; what was not measured is null."""
    records = RunRecords.read(folder)
    summary = summarise(records)
    with writes(folder / SUMMARY):
        write_atomically(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def summarise(records: RunRecords) -> dict[str, Any]:
    """Sum up the records of a run: rates over all its steps, losses at its end."""
    steps, plain = records.steps, records.plain
    useful = sum(step["useful_positions"] for step in steps)
    positions = sum(step["useful_positions"] / step["fill"] for step in steps)
    seconds = sum(step["useful_positions"] / step["fill"] / step["tokens_per_second"] for step in steps)
    summary = {
        "steps": steps[-1]["step"],
        "positions": steps[-1]["positions"],
        "loss": steps[-1]["loss"],
        "packing_efficiency": useful / positions,
        **{key: plain.get(key) for key in ("action_mse", "action_mse_baselines")},
        "retrieval": plain.get("retrieval") or dict.fromkeys(("r1", "r1_low", "r5", "pool")),
        **{key: plain.get(key) for key in ("val_ce", "unigram_ce", "ce_by_source", "ranking")},
        "drop_rate": drop_rate(steps),
        "resume_exact": resume_exact(records.lines),
        "tokens_per_second": positions / seconds,
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "wall_seconds": steps[-1]["wall_seconds"],
    }
    for name, evaluation in records.evaluations.items():
        if evaluation["ablation"] and not evaluation["shards"]:
            suffix = name.replace("-", "_")
            summary[f"action_mse_{suffix}"] = evaluation["action_mse"]
            summary[f"retrieval_r1_{suffix}"] = evaluation["retrieval"]["r1"]
    return summary


def drop_rate(steps: list[dict[str, Any]]) -> float | None:
    """Share of all expert choices that were dropped; None without experts."""
    loads = sum(sum(layer) for step in steps for layer in step.get("expert_load", {}).values())
    drops = sum(sum(layer) for step in steps for layer in step.get("expert_drops", {}).values())
    return drops / loads if loads else None


def resume_exact(lines: list[dict[str, Any]]) -> bool | None:
    """Whether steps that were done twice, before a stop and again after the resume, came out bit for bit the same.

    False when any loss, gradient norm or digest (of weights and optimizer states) differs. True needs a digest
    that was recorded both times; None when no step was done twice, or none of those has such a digest.
    """
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_step[line["step"]].append(line)
    proven = False
    for records in by_step.values():
        for key in ("loss", "grad_norm", "digest"):
            values = [record[key] for record in records if key in record]
            if any(value != values[0] for value in values):
                return False
            proven |= key == "digest" and len(values) > 1
    return True if proven else None
