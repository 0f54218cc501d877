"""Makes the record of each logged step from the steps' results, and gives it to the sinks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mmoe.errors import OutputError
from mmoe.hashing import blake2b
from mmoe.models.moe.routing import RoutingWindow
from mmoe.monitoring.loss_window import LossWindow
from mmoe.monitoring.mfu import ModelFlops
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks import Sink
from mmoe.optional import status
from mmoe.recipe.monitoring import SINKS, MonitoringConfig, SinkConfig, SinkContext
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.training.callback import Callback, EvaluationResult
from mmoe.training.decision import Decision
from mmoe.training.loop import Trainer
from mmoe.training.state import TrainState
from mmoe.training.step import StepResult


class MetricsCallback(Callback):
    """Makes a record every `log_every_steps` steps, where tables or a digest are due, after an evaluation, and last.

    The rate, gradient norms, the stand of the data and the balance of work (that of the replica which has most, over
    the mean) are those of the step. `positions`, `tokens` (without padding), `wall_seconds` and the slots of experts
    count from the begin of the run, without what it undid. All others, losses among them, are over the steps since the
    last record, tables over those since the last ones. Rates are of the steps alone; evaluations, checkpoints and
    records between them are in `wall_seconds`.
    """

    name = "metrics"

    def __init__(self, memory: PeakMemory, tell: Callable[[StepRecord], None] | None = None) -> None:
        """Sample `memory` for every record, and `tell` somebody of it who keeps nothing, such as a terminal."""
        self.memory, self._tell = memory, tell
        self._sinks: dict[str, Sink] = {}  # of the first rank, once it has begun
        self._kept: dict[str, Any] = {}  # the sinks' states, until they are built
        self._set_state({})

    def on_start(self, trainer: Trainer) -> None:
        """Build the sinks on the first rank, and purge what they hold of steps that the run has not done."""
        self._trainer, self._config, self._first = trainer, trainer.run.config.monitoring, trainer.run.ranks.first
        if not self._first:  # the others take part in digests alone
            return
        self._flops = ModelFlops(trainer.run)
        context = SinkContext(trainer.run.folder, trainer.run.config.model_dump(mode="json"))
        for config in sinks_of(self._config):
            self._sinks[config.label] = config.build(context)
        self._rewind(trainer.state.step)
        self._at = time.perf_counter()

    def on_step(self, result: StepResult) -> None:
        """Count the step in, and make a record where one is due."""
        trainer, config = self._trainer, self._config
        digest = state_digest(trainer.state) if result.step in config.digest_steps else None
        if not self._first:
            return
        self._count(result)
        last = result.step == trainer.stop_at or trainer.stopping
        tables = last or result.step % config.tables_every_steps == 0
        if digest or tables or self._evaluated or result.step % config.log_every_steps == 0:
            record = self._record(trainer, result, tables)
            if digest:
                record.notes["digest"] = digest
            self._each(lambda sink: sink.write(record))
            if self._tell is not None:
                self._tell(record)

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Keep the figures for the record of their step: callbacks that measure are told of a step before this one."""
        self._evaluated |= {f"eval/{name}": value for name, value in result.scalars.items()}

    def close(self) -> None:
        """Close the sinks. Raises OutputError for the first that could not write all it had."""
        try:
            self._each(lambda sink: sink.close(), Exception)
        finally:
            self._sinks = {}

    def state_dict(self) -> dict[str, Any]:
        """Return counts and sums since the last record, and what the sinks could not write."""
        return {
            "step": self._step,
            "totals": dict(self._totals),
            "window": dict(self._window),
            "losses": self._losses.state_dict(),
            "routing": self._routing.state_dict(),
            "tables": self._tables.state_dict(),
            "sinks": {**self._kept, **{name: sink.state_dict() for name, sink in self._sinks.items()}},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; sinks that are open purge what came after it."""
        self._set_state(state)
        if self._sinks:
            self._rewind(self._step)

    def _set_state(self, state: dict[str, Any]) -> None:
        self._step = state.get("step", 0)
        self._evaluated: dict[str, float] = {}
        self._totals = defaultdict[str, float](int, state.get("totals", {}))
        self._window = defaultdict[str, float](int, state.get("window", {}))
        self._losses, self._routing, self._tables = LossWindow(), RoutingWindow(), RoutingWindow()
        self._losses.load_state_dict(state.get("losses", {}))
        self._routing.load_state_dict(state.get("routing", {}))
        self._tables.load_state_dict(state.get("tables", {}))
        self._kept = state.get("sinks", {})
        self._at = time.perf_counter()

    @property
    def unwritten(self) -> bool:
        """True if the checkpoint kept records that a disk had refused, and no session has written since."""
        return any(any(state.values()) for state in self._kept.values())

    def _rewind(self, step: int) -> None:
        for name, sink in self._sinks.items():
            sink.load_state_dict(self._kept.pop(name, {}))  # those of sinks that this session lacks are kept on
        self._each(lambda sink: sink.rewind(step))

    def _each(self, act: Callable[[Sink], None], kept: type[Exception] = OutputError) -> None:
        """Have every sink do it, also after one that raised what is `kept`, of which the first is raised at the end."""
        refused: Exception | None = None
        for sink in self._sinks.values():
            try:
                act(sink)
            except kept as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def _count(self, result: StepResult) -> None:
        now = time.perf_counter()
        wall, self._at, self._step = now - self._at, now, result.step
        positions, tokens = result.positions, result.useful_positions
        flops, waited = self._flops.step_flops(result.data.counts), result.data_wait_seconds
        seconds = result.seconds
        _add(self._totals, positions=positions, tokens=tokens, wall_seconds=wall)
        _add(self._window, positions=positions, tokens=tokens, seconds=seconds, waited=waited, flops=flops, steps=1)
        if result.decision is Decision.GO:  # what was skipped may be infinite
            self._losses.add(result.losses)
        self._routing.merge(result.routing)

    def _record(self, trainer: Trainer, result: StepResult, tables: bool) -> StepRecord:
        window, totals = self._window, self._totals
        chosen, dropped = self._routing.slots()
        if chosen:
            _add(totals, slots_routed=chosen, slots_dropped=dropped)
        losses = self._losses.mean() or result.losses
        scalars = {
            "loss": float(losses.loss),
            **{f"loss_{name}": float(value) for name, value in losses.terms.items()},
            **trainer.setting.terms.figures(losses, trainer.run.sources.names),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            **totals,
            "packing_efficiency": window["tokens"] / window["positions"],
            "tokens_per_second": window["tokens"] / window["seconds"],
            "positions_per_second": window["positions"] / window["seconds"],
            "steps_averaged": window["steps"],
            "seconds_per_step": window["seconds"] / window["steps"],
            "data_wait_seconds": window["waited"] / window["steps"],
            **self._flops.scalars(window["flops"], window["seconds"], _processes()),
            **self._routing.scalars(),
            **self._evaluated,
            **_data(trainer, result),
            **dict(zip(("attention_balance", "vision_balance"), result.data.balance, strict=True)),
            "peak_memory_bytes": self.memory.sample(),
        }
        self._tables.merge(self._routing)
        held = {}
        if tables:
            held = self._tables.tables()
            if result.router_gradients is not None:
                held["router_grad_norm"] = result.router_gradients.float().cpu().numpy()
            self._tables = RoutingWindow()
        self._window, self._evaluated = defaultdict(int), {}
        self._losses, self._routing = LossWindow(), RoutingWindow()
        stage = trainer.state.stream.mixture.stage(int(totals["positions"]) - result.positions).name
        return StepRecord(result.step, trainer.state.session, scalars, held, {"stage": stage})


def sinks_of(config: MonitoringConfig) -> tuple[SinkConfig, ...]:
    """Return the sinks of a run: those configured, else jsonl, arrays, and tensorboard where it is installed."""
    if config.sinks is not None:
        return config.sinks
    kinds = ["jsonl", "arrays", *(["tensorboard"] if status("tensorboard").available else [])]
    return tuple(SINKS.find(kind)(kind=kind) for kind in kinds)


def _add(sums: dict[str, float], **amounts: float) -> None:
    for name, amount in amounts.items():
        sums[name] += amount


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _data(trainer: Trainer, result: StepResult) -> dict[str, float]:
    """Where the data stands: what the mixture planned and gave by source, and all that was lost so far.

    Planned and served positions are those of the packing windows before the present one; `storage` counts what the
    first data replica has asked of remote stores in this session, retries among it.
    """
    names, plan, stream = trainer.run.sources.names, result.data.plan, trainer.state.stream
    return {
        **{f"planned_positions/{n}": s + o for n, s, o in zip(names, plan["served"], plan["deficit"])},
        **{f"served_positions/{n}": s for n, s in zip(names, plan["served"])},
        **{f"lost/{reason.replace(' / ', '/', 1)}": count for reason, count in result.data.lost.items()},
        **{f"quarantined/{name}": count for name, count in (+stream.quarantine.lost).items()},
        **{f"storage/{name}": count for name, count in stream.reads.items() if count},
    }


def state_digest(state: TrainState) -> str:
    """Return a digest of every weight, buffer and optimizer state: equal digests mean equal bits."""
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
