"""What watches the loop. Each callback is one small class; its state travels with the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmoe.training.trainer import StepResult, Trainer


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured on held-out data after `step`, by the names that sinks write as ``eval/<name>``."""

    step: int
    scalars: dict[str, float]


class Callback:
    """Base of all callbacks: every hook does nothing."""

    name = "callback"

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this session."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every optimizer step, before a checkpoint of that step is written."""

    def on_evaluation(self, trainer: Trainer, result: EvaluationResult) -> None:
        """After every evaluation within training, on all ranks."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this session, its checkpoint written."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state to resume from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
