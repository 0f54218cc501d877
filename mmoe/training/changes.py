"""Records what was changed of a run on its way in RUN/changes.jsonl: a line for each key, with the step it holds from.

Only what decides numbers and may yet change is recorded: the rate (`--set`) and the length. With it `config.yaml`,
which has the values of now, says what they were at any earlier step.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmoe.config.load import absolute, validate
from mmoe.config.nature import Nature, differences
from mmoe.errors import CheckpointError
from mmoe.files import write_atomically, writes
from mmoe.recipe.config import RunConfig
from mmoe.recipe.upgrade import today_key
from mmoe.training.run import read_config

CHANGES = "changes.jsonl"
RECORDED = (Nature.ADJUSTABLE, Nature.EXTENDABLE)


@dataclass(frozen=True)
class Change:
    """Says that one key has another value from `step` on: the number of steps done when it was changed."""

    step: int
    key: str
    before: Any
    after: Any


_CHANGE = TypeAdapter(Change)


@dataclass(frozen=True)
class History:
    """Holds the config of the run in `folder` as it stands there, and the changes that led to it, in their order."""

    folder: Path
    config: RunConfig
    changes: tuple[Change, ...]

    @classmethod
    def read(cls, folder: str | Path) -> "History":
        """Read the history from the folder of a run.

        Raises ConfigError, and CheckpointError where the record of changes is damaged.
        """
        folder = Path(folder)
        path = folder / CHANGES
        changes = []
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                change = _CHANGE.validate_json(line)
                changes.append(replace(change, key=today_key(change.key)))
            except ValidationError as error:
                why = error.errors()[0]["msg"]
                raise CheckpointError(
                    f"{path}, line {number} is not a recorded change ({why}); remove that line, and what it changed "
                    "counts as having been so from the start"
                ) from error
        # Earlier versions wrote addresses as they were given.
        return cls(folder, absolute(read_config(folder)), tuple(changes))

    def at(self, step: int) -> RunConfig:
        """Return the config that was in force when `step` steps were done: later changes are undone."""
        tree = self.config.model_dump(mode="json")
        for change in reversed(self.later(step)):
            node, name = _holder(tree, change.key)
            node[name] = change.before
        return validate(RunConfig, tree, str(self.folder / CHANGES))

    def changed(self, step: int, now: RunConfig) -> list[Change]:
        """Return the changes that the config `now` makes after `step` steps, of the keys that are recorded."""
        found = differences(self.at(step), now)
        return [Change(step, each.key, each.before, each.now) for each in found if each.nature in RECORDED]

    def later(self, step: int) -> list[Change]:
        """Return the changes that going on from `step` undoes."""
        return [change for change in self.changes if change.step > step]


def record_changes(history: History, step: int, now: RunConfig) -> None:
    """Write the changes that the config `now` makes after `step` steps, in place of those that were made later.

    It is written before the config, so that no value of it is without its line. Raises OutputError.
    """
    new = history.changed(step, now)
    kept = [change for change in history.changes if change.step <= step]
    if new or len(kept) < len(history.changes):
        path = history.folder / CHANGES
        with writes(path):
            write_atomically(path, "".join(json.dumps(asdict(change)) + "\n" for change in (*kept, *new)))


def _holder(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping in which a dotted key stands, and its name there; names may have dots themselves."""
    for name, part in tree.items():
        if isinstance(part, dict) and key.startswith(f"{name}."):
            return _holder(part, key.removeprefix(f"{name}."))
    return tree, key
