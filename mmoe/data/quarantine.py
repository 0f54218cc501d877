"""Samples that cannot be decoded while a run trains: written down, counted, and stopped when they are too many.

Their place in the sequence becomes padding and stays in the planned counts, so the plan never changes.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mmoe.errors import DataError

FEW = 8  # of a source: never enough to stop a run, whatever their share


class Quarantined(NamedTuple):
    """A document part that became padding: its source's number, shard, row and key, the reason, its positions."""

    source: int
    shard: str
    row: int
    key: str
    reason: str
    positions: int


class Quarantine:
    """Counts of parts met and quarantined, by source; `add` raises DataError beyond the error budget.

    `path` is the ``quarantine.jsonl`` to append to, one object a line.
    """

    def __init__(self, names: list[str], budget: float, path: Path | None):
        self.names, self.budget, self.path = names, budget, path
        self.met: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, met: dict[int, int], quarantined: tuple[Quarantined, ...]) -> None:
        """A batch: parts by source number (the quarantined among them), and those that are lost."""
        self.met.update({self.names[source]: number for source, number in met.items()})
        if quarantined and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                for item in quarantined:
                    record = item._asdict() | {"source": self.names[item.source]}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for item in quarantined:
            self.lost[self.names[item.source]] += 1
            self._examples.setdefault(self.names[item.source], item.reason)
        for name in {self.names[item.source] for item in quarantined}:
            if self.lost[name] > max(FEW, self.budget * self.met[name]):
                raise DataError(
                    f"source {name}: {self.lost[name]} of {self.met[name]} documents could not be decoded, more than "
                    f"data.error_budget {self.budget:.2%} allows; the first: {self._examples[name]} (all are in "
                    f"{self.path or 'no file'}); repair or prepare the source again, or raise the budget"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"met": dict(self.met), "lost": dict(self.lost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.met, self.lost = Counter(state["met"]), Counter(state["lost"])
