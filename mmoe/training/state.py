"""Holds what a step changes of a run and a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmoe.checkpoint.rng import capture_rng, restore_rng
from mmoe.data.load.stream import Stream
from mmoe.models.decoder import MultimodalModel
from mmoe.optim.optimizer import CompositeOptimizer, build_optimizer
from mmoe.optim.schedule import Schedule
from mmoe.training.fingerprint import Fingerprint, check_unchanged, fingerprint
from mmoe.training.run import Run, saved_fingerprint


@dataclass
class TrainState:
    """Holds all that a training step changes: `step` steps are done, in `session` + 1 calls of `mmoe train`.

    `position` is where the stream stands after them, which is behind what its workers have read ahead. The schedule is
    a function of the step and has no state. `data` says what the numbers follow from besides the config.
    """

    model: MultimodalModel
    optimizer: CompositeOptimizer
    schedule: Schedule
    stream: Stream
    data: Fingerprint
    position: dict[str, Any]
    step: int = 0
    session: int = 0

    @classmethod
    def from_run(cls, run: Run) -> TrainState:
        """Build the state before the first step of `run`, whose model has its initial (or given) weights."""
        config, batch = run.config, run.resolved.batch
        stream = Stream(
            config.data,
            run.sources,
            run.tokenizers,
            seed=config.training.seed,
            micro_sequences=batch.micro_batch_sequences,
            end=config.training.budget_positions,
            sequences=batch.sequences,
            group_sequences=run.resolved.contrastive_group,
            label_weights=config.losses.ce.label_weights(),
            replica=run.ranks.replica,
            replicas=run.ranks.replicas,
            quarantine=run.folder / "quarantine.jsonl",
        )
        return cls(
            run.model,
            build_optimizer(run.model, config.optim.optimizer, config.optim.matrices),
            run.resolved.schedule,
            stream,
            fingerprint(run.sources, run.tokenizers),
            stream.state(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sections of a checkpoint; tensors are those in use, not copies."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": {"step": self.step, "session": self.session, "stream": self.position, "data": self.data},
            "rng": capture_rng(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a `state` that `state_dict` gave; the session stays as it is."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position = state["trainer"]["step"], state["trainer"]["stream"]
        self.stream.restore(self.position)
        restore_rng(state["rng"])

    def check_data(self, state: dict[str, Any], run: Run) -> None:
        """Check that the checkpoint `state` was trained on the data that `run` finds now.

        Raises CheckpointError where the data differs.
        """
        check_unchanged(saved_fingerprint(state), self.data, run.folder)
