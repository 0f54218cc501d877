"""Decides whether a run may go on with another config than it had, and what is to be said of it.

Each field says by its `Nature` what it is. A changed identity is refused; layout and operation may change, and that is
said. The length may change: steps done are never recomputed, the plan of the data goes on from where it stood, and the
rate from where the new length has it. Where the new length would have given steps done another rate or other shares of
the sources, that is said and not refused: the weights are what they are, and to decay anew from a finished run is
usual. Refused is what breaks a promise of the config: a source that would be seen more often than its `max_epochs`.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmoe.config.load import flatten, override, parse_overrides
from mmoe.config.nature import Difference, Nature, differences, natures
from mmoe.data.plan.mixture import Mixture
from mmoe.errors import ConfigError
from mmoe.recipe.config import RunConfig
from mmoe.training.changes import CHANGES, History

DECIDES = {
    "data": "what every step is trained on",
    "tokenizers": "which ids and vectors the data becomes",
    "model": "which function the weights belong to",
    "losses": "what is minimized",
    "optim": "what a step does with its gradients",
    "precision": "in which numbers all is computed",
    "training": "how the run begins and how large its steps are",
}
_POINTS = 512  # of the midpoint rule over what the run has passed, and of the positions that are compared
_SLACK = 1e-3  # of `max_epochs`: shares are met by whole documents


def adjust(config: RunConfig, given: Sequence[str]) -> RunConfig:
    """Return `config` with the values of `--set`, each ``key=value`` in `given`.

    Raises ConfigError for one that is not adjustable, or no value.
    """
    adjusted = override(config, given)
    found = natures(adjusted)
    for key in flatten(parse_overrides(given)):
        for each, nature in found.items():
            if _within(each, key) and nature is not Nature.ADJUSTABLE:
                raise ConfigError(f"--set {key}: {each} is {nature.value}, {_instead(each, nature)}")
    return adjusted


def check_resume(
    history: History,
    now: RunConfig,
    step: int,
    mixture: Callable[[RunConfig], Mixture],
    given: Sequence[str] = (),
) -> list[str]:
    """Return in sentences what is other where the run of `history` goes on after `step` steps with the config `now`.

    `mixture` makes the mixture of the data of a config of this run. `given` are the values of `--set`, which are in
    `now` already. Raises ConfigError for what cannot change, naming the key, its values, what it decides and a remedy.
    """
    saved, folder = history.at(step), history.folder
    found = differences(saved, now)
    _refuse_identity(history, found, step, given)
    said = []
    if found:
        said.append(f"{folder} goes on with other {', '.join(map(str, found))}")
    if any(each.nature is Nature.EXTENDABLE for each in found):
        _refuse_shorter(history, now, step)
        _refuse_repeats(history, now, step, mixture)
        said += _shares(mixture(saved), mixture(now), now, step)
    said += _rate(history, now, step)
    said += [
        f"{folder}: the change of {change.key} ({change.before} -> {change.after}) after step {change.step} is undone"
        for change in history.later(step)
    ]
    return said


def _refuse_identity(history: History, found: list[Difference], step: int, given: Sequence[str]) -> None:
    keys = list(flatten(parse_overrides(given)))
    identity = [each for each in found if each.nature is Nature.IDENTITY]
    unasked = [
        each
        for each in found
        if each.nature is Nature.ADJUSTABLE
        and not any(_within(each.key, key) or _within(key, each.key) for key in keys)
    ]
    if not identity and not unasked:
        return
    refused = [*identity, *unasked]
    sections = dict.fromkeys(each.key.split(".")[0] for each in refused)
    why = ", ".join(f"{name} decides {DECIDES.get(name, 'what its steps compute')}" for name in sections)
    sentence = f"{history.folder}/config.yaml differs from this config in {', '.join(map(str, refused))}; {why}"
    for each in unasked:
        sentence += f"; {_recorded(history, each, step)}"
    remedies = "set another training.run, or start over with --fresh"
    raise ConfigError(f"{sentence}; undo the change, {remedies}" if identity else f"{sentence}; else {remedies}")


def _recorded(history: History, found: Difference, step: int) -> str:
    """How the run goes on where an adjustable key differs: by what was recorded of it, or by a recorded change."""
    change = next((change for change in reversed(history.changes) if change.key == found.key), None)
    take, keep = _setting(found.key, found.now), _setting(found.key, found.before)
    if change is not None:
        changed = f"{found.key} was changed after step {change.step} ({history.folder / CHANGES})"
        if change.step > step and change.after == found.now:
            return (
                f"{changed}, which going back to step {step} undoes: --set {take} changes it from here on, {keep} goes "
                "on without the change"
            )
        if change.step <= step and change.after == found.before:
            return (
                f"{changed}, and that counts: resume by the folder ({_by_folder(history)}) or with {keep}; "
                f"--set {take} changes it again"
            )
    return f"a run may change {found.key} on its way where that is recorded: --set {take}"


def _refuse_shorter(history: History, now: RunConfig, step: int) -> None:
    if (steps := now.batch.iterations) < step:
        least = step * now.training.global_batch_positions
        raise ConfigError(
            f"training.budget_positions {now.training.budget_positions} is {steps} steps, but {step} are done, and "
            f"steps done stay done: set it to {least} or more, resume with the length the run has by its folder "
            f"({_by_folder(history)}), or go back by --from-step"
        )


def _rate(history: History, now: RunConfig, step: int) -> list[str]:
    """What the rate does at `step` where the steps done had another than the config now gives them."""
    saved = history.at(step)
    old, new = (config.optim.build_schedule(config.batch) for config in (saved, now))
    other = sum(old(done) != new(done) for done in range(step))
    if not other or step >= new.iterations:
        return []
    had = history.at(step - 1)
    last = had.optim.build_schedule(had.batch)(step - 1)
    sentence = f"the rate at step {step} was {last:.4g} and goes on with {new(step):.4g}"
    if saved.optim == now.optim:
        sentence += (
            f": optim.schedule.kind {new.kind} follows the length of the run, and a run of {new.iterations} steps "
            f"from the start would have had another rate in {other} of these {step} steps, {new(step - 1):.4g} in the "
            "last"
        )
    return [sentence]


def _shares(before: Mixture, after: Mixture, now: RunConfig, step: int) -> list[str]:
    """Which stages have other shares where they have been passed: those steps stay as they were."""
    passed = step * now.training.global_batch_positions
    said = []
    for stage in before.stages:
        points = _points(stage.start, passed if stage is before.stages[-1] else min(stage.stop, passed))
        had, would = (np.array([mixture.shares(at) for at in points]) for mixture in (before, after))
        if (had == would).all():
            continue
        point, source = np.unravel_index(np.abs(had - would).argmax(), had.shape)
        said.append(
            f"the shares of stage {stage.name} follow the length of the run: at position {points[point]:,}, which is "
            f"done, source {before.sources[source].name} had {had[point, source]:.1%} and would have had "
            f"{would[point, source]:.1%} in a run of this length from the start; the run goes on with "
            f"{after.shares(passed)[source]:.1%}"
        )
    return said


def _refuse_repeats(history: History, now: RunConfig, step: int, mixture: Callable[[RunConfig], Mixture]) -> None:
    """Raises ConfigError where what was seen and what is to come of a source are more epochs than it may have."""
    size = now.training.global_batch_positions
    borders = sorted({0, *(change.step for change in history.changes if change.step < step), step})
    after = mixture(now)
    used = _used(after, step * size, now.batch.iterations * size)
    for first, last in pairwise(borders):
        used += _used(mixture(history.at(first)), first * size, last * size)
    for source, positions in zip(after.sources, used.tolist(), strict=True):
        epochs = positions / max(source.positions, 1)
        if source.max_epochs is not None and epochs > source.max_epochs * (1 + _SLACK):
            key = f"data.sources.{source.name}.max_epochs"
            raise ConfigError(
                f"{history.folder}: {key} is {source.max_epochs:g}, but with what its {step} steps have seen a run of "
                f"{now.batch.iterations} steps would see source {source.name} {epochs:.3g} times; raise {key}, set it "
                "to null, or set training.budget_positions lower"
            )


def _used(mixture: Mixture, first: int, last: int) -> np.ndarray:
    """[sources] positions that are expected of each source between two positions of the run."""
    used = np.zeros(len(mixture.sources))
    for stage in mixture.stages:
        start = max(first, stage.start)
        stop = last if stage is mixture.stages[-1] else min(last, stage.stop)
        if points := _points(start, stop):
            used += np.mean([mixture.shares(at) for at in points], axis=0) * (stop - start)
    return used


def _points(start: int, stop: int) -> list[int]:
    """The midpoints of equal parts of a stretch of positions; none where it is empty."""
    number = min(_POINTS, max(stop - start, 0))
    return [start + (2 * i + 1) * (stop - start) // (2 * number) for i in range(number)]


def _by_folder(history: History) -> str:
    return f"mmoe train {shlex.quote(str(history.folder))}"


def _within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _setting(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else shlex.quote(json.dumps(value))}"


def _instead(key: str, nature: Nature) -> str:
    """What to do with a key that is not adjustable."""
    if nature is Nature.IDENTITY:
        section = key.split(".")[0]
        why = f"{section} decides {DECIDES.get(section, 'what its steps compute')}"
        return f"which no run changes on its way ({why}); train a new run with it"
    return f"which needs no --set: give {key}=... as an override"
