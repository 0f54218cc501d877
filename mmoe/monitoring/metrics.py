"""What each logged step leaves behind: one JSON line in `metrics.jsonl`, and the same scalars for TensorBoard."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from mmoe.files import writes
from mmoe.hashing import blake2b
from mmoe.models.moe.routing import RoutingWindow, by_expert, router_gradients
from mmoe.monitoring.lines import LineFile
from mmoe.optional import needs, status
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.training.callback import Callback
from mmoe.training.loop import Trainer
from mmoe.training.state import TrainState
from mmoe.training.step import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

IN_METRICS = "metrics.jsonl beside it has every record"


class MetricsWriter(Callback):
    """Writes a record every `log_every_steps` steps, at the last step, and where a digest is asked for.

    Loss terms and gradient norms are those of the step; rates and routing statistics are over the steps since the
    last record.
    """

    name = "metrics"

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory
        self.wall_seconds = 0.0  # of all sessions
        self._pending: list[str] = []  # records that the disk would not take

    def on_start(self, trainer: Trainer) -> None:
        """Open metrics.jsonl and TensorBoard on the first rank."""
        self._trainer = trainer
        config = trainer.run.config.monitoring
        self._every, self._digests = config.log_every_steps, set(config.digest_steps)
        first = trainer.run.ranks.first  # the others take part in digests alone
        self._file = LineFile(trainer.run.folder / "metrics.jsonl", self._pending) if first else None
        self._board_folder = trainer.run.folder / "tensorboard"
        with writes(self._board_folder):
            self._board = _board(self._board_folder, config.tensorboard) if first else None
        self._since = self._began = time.perf_counter()
        self._before = self.wall_seconds
        self._clear()

    def on_step(self, result: StepResult) -> None:
        """Count the step in, and write a record where one is due."""
        trainer = self._trainer
        self._steps += 1
        self._positions += result.positions
        self._useful += result.useful_positions
        self._routing.merge(result.routing)
        digest = result.step in self._digests
        if digest or result.step % self._every == 0 or result.step == trainer.stop_at or trainer.interrupted:
            self._write(trainer, result, digest)

    def close(self) -> None:
        """Close what was opened."""
        if self._file:
            self._file.close()
        if self._board:
            with writes(self._board_folder, IN_METRICS):
                self._board.close()

    def state_dict(self) -> dict[str, Any]:
        """Give the time spent so far and the lines that could not be written yet."""
        return {"wall_seconds": self.wall_seconds, "unwritten": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.wall_seconds = state.get("wall_seconds", 0.0)
        self._pending = list(state.get("unwritten", []))

    def _write(self, trainer: Trainer, result: StepResult, digest: bool) -> None:
        now = time.perf_counter()
        self.wall_seconds = self._before + now - self._began
        seconds = now - self._since
        record: dict[str, Any] = {
            "step": result.step,
            "session": trainer.state.session,
            "positions": result.step * result.positions,
            "useful_positions": self._useful,
            "loss": float(result.losses.total),
            **{f"loss_{name}": float(value) for name, value in result.losses.terms.items()},
            **result.losses.details(trainer.run.sources.names),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "fill": self._useful / self._positions,
            "tokens_per_second": self._positions / seconds,
            "seconds": seconds / self._steps,
            "wall_seconds": self.wall_seconds,
            **self._routing.record(trainer.run.sources.names),
            **router_gradients(result.router_gradients),
            **_stream(trainer, result),
            "peak_memory_bytes": self.memory.sample(),
        }
        if digest:
            record["digest"] = state_digest(trainer.state)
        self._since = now
        self._clear()
        if self._file:
            self._file.write(json.dumps(record))
        if self._board:
            with writes(self._board_folder, IN_METRICS):
                for key, value in record.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(key, value, result.step)
                for key, value in by_expert(record):
                    self._board.add_scalar(key, value, result.step)

    def _clear(self) -> None:
        self._steps = self._positions = self._useful = 0
        self._routing = RoutingWindow()


def _board(folder: Path, wanted: bool | None) -> "SummaryWriter | None":
    """TensorBoard's writer where it is `wanted`; None: where the package is installed."""
    if wanted is False or (wanted is None and not status("tensorboard").available):
        return None
    with needs("monitoring.tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder)


def _stream(trainer: Trainer, result: StepResult) -> dict[str, Any]:
    """Where the data stands: the stage, what the mixture planned and gave by source, and all that was lost so far.

    Planned and served positions are those of the packing windows before the present one; `storage` counts what the
    first data replica has asked of remote stores in this session, retries among it.
    """
    stream, plan = trainer.state.stream, result.data.plan
    served, owed = plan["served"], plan["owed"]
    return {
        "stage": stream.mixture.stage((result.step - 1) * result.positions).name,
        "planned_positions": {n: s + o for n, s, o in zip(trainer.run.sources.names, served, owed)},
        "served_positions": dict(zip(trainer.run.sources.names, served)),
        "lost": result.data.lost,
        "quarantined": dict(+stream.quarantine.lost),
        "storage": {name: count for name, count in stream.reads.items() if count},
    }


def state_digest(state: TrainState) -> str:
    """A digest of every weight, buffer and optimizer state: equal digests mean equal bits."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    held: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
        (names[id(p)], p, state.optimizer.state.get(p, {})) for p in state.model.parameters()
    ]
    held += [(name, buffer, {}) for name, buffer in state.model.named_buffers()]

    def parts() -> Iterator[bytes]:
        for name, weight, states in held:
            tensors = {"weight": weight, **states}
            for key in sorted(tensors):
                value = torch.as_tensor(tensors[key]).detach()
                value = (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()
                yield f"{name}.{key}".encode()
                yield value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return blake2b(parts(), 16).hex()
