"""Compares runs by what their folders hold: configs, records at equal steps, their ends, and evaluations.

A run may be unfinished, of another version, or lack any of these; what it lacks is said, and None where it would stand.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.config.load import flatten, read_layers
from mmoe.errors import ConfigError, DataError
from mmoe.monitoring.reader import RunReader, read_lines
from mmoe.monitoring.summary import RunRecords
from mmoe.recipe.upgrade import upgrade_config
from mmoe.training.run import CONFIG, is_run

AT_MOST = 5  # at which records are compared
_OWN = "training.run"  # differs between any two runs
_BOUND = "max_documents"  # of an evaluation
_FIGURES = ("loss", "grad_norm", "lr")  # of a record, beside the terms of its loss

Beside = dict[str, list[Any]]
"""Values by name, one for each run: None where a run has none."""


@dataclass(frozen=True)
class Comparison:
    """Holds what runs have in common to be compared by: rows with a value for each run, in the order of `runs`.

    `config` has the keys that differ, `steps` the records of steps that all runs recorded, `end` the last record
    of each, `evaluation` its measures on held-out data, and `lacking` what a run has not, a sentence each.
    """

    runs: list[str]
    config: Beside
    steps: dict[int, Beside]
    end: Beside
    evaluation: Beside
    lacking: dict[str, list[str]]


@dataclass
class _Run:
    """What the folder of a run holds."""

    folder: Path
    lacking: list[str] = field(default_factory=list)

    def read(self, what: Callable[[Path], Any], absent: Any) -> Any:
        """What is read of its folder, or `absent`, and a sentence on why not."""
        try:
            return what(self.folder)
        except (ConfigError, DataError, OSError) as error:
            self.lacking.append(str(error))
            return absent


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Compare the runs in these folders. Raises ConfigError for a folder that is no run."""
    for folder in folders:
        if not is_run(folder):
            raise ConfigError(f"{folder} is not a run: it holds no {CONFIG}; give the folders of runs, e.g. runs/demo")
    runs = [_Run(folder) for folder in folders]
    configs = [run.read(_config, {}) for run in runs]
    last = [run.read(lambda folder: RunReader(folder).last(), {}) for run in runs]
    evaluations = [_evaluations(run) for run in runs]
    for run, found in zip(runs, evaluations, strict=True):
        if not found:
            run.lacking.append(f"{run.folder} has no evaluation; mmoe evaluate {run.folder} makes one")
    known = [found for found in configs if found]
    config = {key: values for key, values in _rows(known).items() if any(value != values[0] for value in values)}
    present = [run for run, found in zip(runs, last, strict=True) if found]
    return Comparison(
        runs=[str(folder) for folder in folders],
        config={key: [found.get(key) for found in configs] for key in config if key != _OWN},
        steps=_at_equal_steps(runs, present),
        end=_rows([_end(record, config) for record, config in zip(last, configs, strict=True)]),
        evaluation={row: v for row, v in _rows(evaluations).items() if not row.startswith(_BOUND) or _differs(v)},
        lacking={str(run.folder): run.lacking for run in runs if run.lacking},
    )


def _rows(columns: Sequence[dict[str, Any]]) -> Beside:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _config(folder: Path) -> dict[str, Any]:
    try:
        return flatten(upgrade_config(read_layers(folder / CONFIG)[1]))
    except FileNotFoundError:
        raise ConfigError(f"{folder / CONFIG} does not exist; a checkpoint of the run has a copy") from None


def _at_equal_steps(runs: list[_Run], present: list[_Run]) -> dict[int, Beside]:
    """The records of a few steps that all of `present` recorded, the last of these among them."""
    steps = [run.read(lambda folder: RunReader(folder).columns()["step"], None) for run in present]
    if len(present) < 2 or any(found is None for found in steps):
        return {}
    common = reduce(np.intersect1d, steps)
    chosen = common[np.unique(np.linspace(len(common) - 1, 0, AT_MOST).round().astype(int))] if len(common) else common
    wanted = set(chosen.tolist())
    records = {id(run): _records(run.folder, wanted) if run in present else {} for run in runs}
    return {step: _rows([_figures(records[id(run)].get(step, {})) for run in runs]) for step in sorted(wanted)}


def _records(folder: Path, steps: set[int]) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_lines(RunReader(folder).path) if record["step"] in steps}


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    terms = [name for name in record if name.startswith("loss_")]
    return {name: record[name] for name in (_FIGURES[0], *terms, *_FIGURES[1:]) if name in record}


def _end(record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if not record:
        return {}
    seconds, steps = record.get("wall_seconds"), record["step"]
    budget, batch = config.get("training.budget_positions"), config.get("training.global_batch_positions")
    speeds = {
        "tokens_per_second": record["tokens"] / seconds if seconds and "tokens" in record else None,
        "seconds_per_step": seconds / steps if seconds and steps else None,
    }
    about = {name: record.get(name) for name in ("tokens", "wall_seconds", "mfu", "peak_memory_bytes")}
    return {
        "step": steps,
        "of_steps": budget // batch if budget and batch else None,
        **_figures(record),
        **speeds,
        **about,
    }


def _evaluations(run: _Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, evaluation in run.read(lambda folder: RunRecords.read(folder).evaluations, {}).items():
        found |= run.read(partial(_evaluation, name, evaluation), {})
    return found


def _evaluation(name: str, evaluation: dict[str, Any], folder: Path) -> dict[str, Any]:
    suffix = f" ({name})" if name else ""
    try:
        return {f"{row}{suffix}": value for row, value in _measures(evaluation)}
    except (KeyError, TypeError, AttributeError) as error:
        path = folder / f"evaluation{name and '-'}{name}.json"
        raise DataError(f"{path} is no evaluation of this version ({error!r}); evaluate again") from error


def _differs(values: list[Any]) -> bool:
    """Whether those that are there are not all the same."""
    present = [value for value in values if value is not None]
    return any(value != present[0] for value in present)


def _measures(evaluation: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for source, counts in (evaluation.get("samples") or {}).items():
        yield f"samples of {source}", counts.get("evaluated")
    if _BOUND in evaluation:
        yield _BOUND, evaluation[_BOUND] or "unbounded"
    for source, entries in (evaluation.get("ce_by_source") or {}).items():
        for kind, entry in entries.items():
            yield f"CE of {kind}, {source}", entry.get("ce")
            yield f"unigram CE of {kind}, {source}", entry.get("unigram")
    for source, errors in ((evaluation.get("actions") or {}).get("by_source") or {}).items():
        yield from ((f"action error, {source}: {who}", errors.get(who)) for who in ("model", "hold_last", "ridge"))
    for name, entry in ((evaluation.get("retrieval") or {}).get("by") or {}).items():
        pool = entry if entry.get("r1") is not None else entry.get("smaller_pool")
        yield (f"recall@1 of {pool['pool']}, {name}", pool["r1"]) if pool else (f"recall@1, {name}", None)
    for source, entry in (evaluation.get("ranking") or {}).items():
        yield from ((f"ranking by {score}, {source}", share) for score, share in (entry.get("accuracy") or {}).items())
