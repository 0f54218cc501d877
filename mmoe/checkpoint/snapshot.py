"""Holds a state at one moment as the parts of a checkpoint: taken on the training thread, written by `writer`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mmoe.checkpoint.tensors import union
from mmoe.checkpoint.tree import split_tree
from mmoe.runtime.agreement import ProcessGroupRanks

MARGIN = 1 << 20  # bytes of names, headers and state.json


@dataclass(frozen=True)
class Snapshot:
    """Holds what this rank has of a state (`mmoe.checkpoint.tree`) after a step.

    `document` and `texts` (of files beside it, by name) are copies. `tensors` are those of the live state as `take`
    makes it, and `owner` is then the thread that may change them: it writes the snapshot before it goes on. One whose
    tensors are copies has no owner (None), and any thread may write it at any time.
    """

    step: int
    document: Any
    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]
    owner: int | None

    @classmethod
    def take(cls, step: int, state: dict[str, Any], texts: Mapping[str, str]) -> Snapshot:
        """Split `state` after `step` into a snapshot, without copying a tensor.

        Raises TypeError naming the path of what cannot be saved.
        """
        document, tensors = split_tree(state)
        return cls(step, document, tensors, dict(texts), owner=threading.get_ident())

    @property
    def shares_memory(self) -> bool:
        """True if a change of the live state would change what is written."""
        return self.owner is not None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each tensor by name, of all its shards together."""
        return {name: tensor.numel() * tensor.element_size() for name, tensor in self.tensors.items()}

    def gather(self, ranks: ProcessGroupRanks) -> Holdings:
        """Collect on rank 0 what the snapshots of all `ranks` hold.

        Raises RuntimeError where this thread may not write one of them.
        """
        ranks.every(self._check_owner)
        held = ranks.gather((self.document, self.sizes()))
        size = ranks.first(lambda: sum(union(sizes for _, sizes in held).values()) + MARGIN)
        return Holdings([document for document, _ in held], size)

    def _check_owner(self) -> None:
        if self.shares_memory and self.owner != threading.get_ident():
            raise RuntimeError(
                f"the snapshot of step {self.step} shares its tensors with a state that another thread may change; "
                "copy them before it is written here"
            )


class Holdings(NamedTuple):
    """Holds what all ranks have of a state: what rank 0 writes for all, and the room that all of it takes."""

    documents: list[Any]  # of every rank, on rank 0; empty elsewhere
    size: int  # bytes, at most, the same on every rank
