"""Write down and count samples that cannot be decoded while a run trains, and stop it when they are too many.

Their place in the sequence becomes padding and stays in the planned counts, so the plan never changes.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmoe.errors import DataError
from mmoe.files import writes
from mmoe.runtime.logging import append
from mmoe.schema.quarantined import Quarantined

ENDED_WORKER = "the decoding of a sample ended its process"  # how the reason begins of one that is not tried again
FEW = 8  # of a source: never enough to stop a run, whatever their share


class Quarantine:
    """Counts the parts met and quarantined by all data replicas, by source.

    `path` is the ``quarantine.jsonl`` to append to, one object a line.
    """

    def __init__(self, names: list[str], budget: float, path: Path | None) -> None:
        self.names, self.budget, self.path = names, budget, path
        self.met: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self._new = torch.zeros(len(names), 2, dtype=torch.int64)  # met and lost here since `settle`
        self._examples: dict[int, str] = {}

    def add(self, met: dict[int, int], quarantined: tuple[Quarantined, ...]) -> None:
        """Record a batch of this replica: parts met by source number (the quarantined among them), and those lost."""
        for source, number in met.items():
            self._new[source, 0] += number
        if quarantined and self.path is not None:
            records = [item._asdict() | {"source": self.names[item.source]} for item in quarantined]
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            with writes(self.path, "the run goes on from its last checkpoint"):
                append(self.path, lines)
        for item in quarantined:
            self._new[item.source, 1] += 1
            self._examples.setdefault(item.source, item.reason)

    def known_bad(self, tars: list[tuple[str, ...]]) -> dict[tuple[int, int, int], str]:
        """Return why samples ended a decoding process in an earlier session, by source, shard and row.

        `tars` are each source's shards. They are read from the file, where every replica has written its own: a run
        that goes on does not die of the same sample again. Delete their lines to have them tried again.
        """
        numbers = {(self.names[n], _tail(tar)): (n, s) for n, found in enumerate(tars) for s, tar in enumerate(found)}
        bad = {}
        for line in self._lines():
            try:
                record = json.loads(line)
                place = numbers.get((record["source"], _tail(record["shard"])))
                if place is not None and record["reason"].startswith(ENDED_WORKER):
                    source, shard = place
                    bad[source, shard, int(record["row"])] = record["reason"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
        return bad

    def _lines(self) -> list[str]:
        if self.path is None or not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()

    def settle(self, sum_over_data: Callable[[Tensor], Tensor]) -> None:
        """Count, after a step, what all replicas met and lost in it.

        Raises DataError, on every rank that reads for a replica, beyond the error budget.
        """
        for source, (met, lost) in enumerate(sum_over_data(self._new).tolist()):
            name = self.names[source]
            self.met[name] += met
            self.lost[name] += lost
            if lost and self.lost[name] > max(FEW, self.budget * self.met[name]):
                example = f"one: {self._examples[source]}; " if source in self._examples else ""
                raise DataError(
                    f"source {name}: {self.lost[name]} of {self.met[name]} documents could not be decoded, more than "
                    f"data.error_budget {self.budget:.2%} allows ({example}all are in {self.path or 'no file'}); "
                    "repair or prepare the source again, or raise the budget"
                )
        self._new.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the run so far, as a checkpoint holds them."""
        return {"met": dict(+self.met), "lost": dict(+self.lost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint, and forget what was met since `settle`, in a step that is dropped."""
        self.met, self.lost = Counter(state["met"]), Counter(state["lost"])
        self._new.zero_()


def _tail(tar: str) -> tuple[str, ...]:
    """Split and name of a shard: what stays when a source is moved."""
    return tuple(str(tar).split("/")[-2:])
