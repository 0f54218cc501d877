"""The training loop: next batch, forward, losses, backward, clip, step, schedule, callbacks."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.checkpoint.rng import capture_rng, restore_rng
from mmoe.config.load import dump
from mmoe.data.load.stream import StepData, Stream
from mmoe.errors import CheckpointError, DivergenceError, OutputError
from mmoe.losses.total import LossReport, PlannedCounts
from mmoe.models.moe.balance import update_choice_bias
from mmoe.models.moe.routing import RoutingWindow
from mmoe.optim.adamw import clip_gradients
from mmoe.optim.muon import build_optimizer
from mmoe.runtime.launch import agreed
from mmoe.runtime.watch import Watch
from mmoe.training.callback import Callback
from mmoe.training.data_wait import DataWait
from mmoe.training.fingerprint import check_unchanged, fingerprint
from mmoe.training.gradients import StepSetting, step_gradients
from mmoe.training.run import CONFIG, Run, saved_fingerprint


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; `losses` are sums over items divided by the planned counts."""

    step: int  # 1-based: the number of steps done
    losses: LossReport
    lr: float
    grad_norm: float  # before clipping
    router_gradients: torch.Tensor | None  # [MoE layers, experts], before clipping; see router_gradient_norms
    positions: int
    useful_positions: int
    seconds: float
    data_wait_seconds: float  # that this process waited for its batches
    routing: RoutingWindow
    data: StepData


class Trainer:
    """Trains a run from where its state stands to its last step, or to `stop_at`."""

    def __init__(self, run: Run, callbacks: list[Callback], stop_at: int | None = None) -> None:
        config = run.config
        self.run, self.callbacks, self.batch = run, callbacks, run.resolved.batch
        self.setting = StepSetting.of(run.resolved, run.tokenizers.vocabulary, run.device, run.ranks)
        self.last_step = self.batch.iterations
        self.stop_at = min(stop_at or self.last_step, self.last_step)
        self.schedule = run.resolved.schedule
        self.optimizer = build_optimizer(run.model, config.optim.adamw, config.optim.muon)
        self.stream = Stream(
            config.data,
            run.sources,
            run.tokenizers,
            seed=config.training.seed,
            micro_sequences=self.batch.micro_batch_sequences,
            end=config.training.budget_positions,
            sequences=self.batch.sequences,
            group_sequences=run.resolved.contrastive_group,
            label_weights=config.losses.label_weights(),
            replica=run.ranks.replica,
            replicas=run.ranks.replicas,
            quarantine=run.folder / "quarantine.jsonl",
        )
        self.checkpoints = CheckpointManager(run.folder / "checkpoints", config.checkpoint)
        self.fingerprint = fingerprint(run.sources, run.tokenizers)
        self.data_wait = DataWait()
        self.step = 0
        self.session = 0
        self.stream_state = self.stream.state()
        self.saved = 0  # the step of the last checkpoint
        self.stop_requested = False  # by a signal to this process
        self.unwritten: OutputError | None = None  # what a callback of this process could not write
        self.interrupted = False  # by one to any process, known to all after the same step

    def train(self) -> None:
        """Train to the end of the session, saving and telling the callbacks on the way.

        Raises DivergenceError, and at the end the OutputError of a callback.
        """
        for callback in self.callbacks:
            callback.on_start(self)
        with _stop_on_interrupt(self), Watch(self.run.config.parallel.timeout_seconds, self.run.folder) as watch:
            steps = self.data_wait.timed(self.run.ranks.steps(self.stream, self.batch.accumulation))
            while self.step < self.stop_at and not self.interrupted:
                watch.beat(self.step + 1, "data")
                data = next(steps)
                watch.beat(self.step + 1, "step")
                result = self.train_step(data)
                self.interrupted = agreed(self.stop_requested)
                watch.beat(self.step, "callbacks")
                self._tell(result)
                if self.checkpoints.config.due(self.step, self.last_step):
                    self.save()
            if self.step != self.saved:
                watch.beat(self.step, "checkpoint")
                self.save()
        for callback in self.callbacks:
            with self._keeping():
                callback.on_end(self)
        if self.unwritten is not None:
            raise self.unwritten

    def _tell(self, result: StepResult) -> None:
        """Tell the callbacks; what one of them could not write ends the run after the next step, saved.

        The other ranks know nothing of it, and agree to end only once a step.
        """
        for callback in self.callbacks:
            with self._keeping():
                callback.on_step(self, result)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep the first OutputError for the end."""
        try:
            yield
        except OutputError as error:
            self.unwritten = self.unwritten or error
            self.stop_requested = True

    def train_step(self, data: StepData) -> StepResult:
        """Do one optimizer step on `data`. Raises DivergenceError where a gradient is not finite."""
        started = time.perf_counter()
        data = replace(data, batches=self.data_wait.timed(data.batches))
        model, config = self.run.model, self.run.config
        model.train()
        counts = PlannedCounts.of(data.counts, config.losses, sequences=self.batch.sequences)
        seed = _step_seed(config.training.seed, self.step)
        gradients = step_gradients(model, data.batches, counts, self.setting, seed)
        report, grad_norm, routing = gradients.report, gradients.norm, RoutingWindow()
        routing.add(gradients.routing)
        if not grad_norm.isfinite():
            terms = ", ".join(f"{name} {float(value):.4g}" for name, value in report.terms.items())
            raise DivergenceError(
                f"{self.run.folder}: the gradient norm of step {self.step + 1} is {float(grad_norm)} ({terms})"
                f"{_broken_router(routing)}; "
                "no weight was changed: begin another run (training.run) with a lower optim.lr.peak or a longer "
                f"warmup, from the weights of this one by training.start_from.weights={self.run.folder}"
            )
        clip_gradients(model.parameters(), grad_norm, config.optim.clip)
        lr = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        routers, moe = model.decoder.routers, config.model.moe  # a pipeline stage may have none
        if routers and moe is not None and moe.bias_rate:
            update_choice_bias(routers, gradients.loads.total(), moe.bias_rate)
        self.step += 1
        self.stream.quarantine.settle(self.run.ranks.sum_over_data)
        self.stream_state = self.stream.state(data)
        return StepResult(
            step=self.step,
            losses=report,
            lr=lr,
            grad_norm=float(grad_norm),
            router_gradients=gradients.router_norms_NE,
            positions=self.batch.global_batch_positions,
            useful_positions=data.counts.positions,
            seconds=time.perf_counter() - started,
            data_wait_seconds=self.data_wait.take(),
            routing=routing,
            data=data,
        )

    def save(self) -> None:
        """Write a checkpoint of the step that the run stands at."""
        self.checkpoints.save(self.step, self._state(), {CONFIG: dump(self.run.config)})
        self.saved = self.step

    def resume(self, step: int | None = None) -> None:
        """Continue from the newest whole checkpoint, or from the one after `step`; newer ones are set aside.

        Raises CheckpointError where none is whole, or where the data is not that of the checkpoint.
        """
        state = self._state()
        found = self.checkpoints.load(state, step)
        check_unchanged(saved_fingerprint(state), self.fingerprint, self.run.folder)
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{self.checkpoints.folder}: the state of step {found} is not that of a training ({error!r}); resume "
                "from another by --from-step"
            ) from error
        self.checkpoints.go_back(found)

    def _take(self, state: dict[str, Any]) -> None:
        self.run.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        trainer = state["trainer"]
        self.step, self.session, self.stream_state = (
            trainer["step"],
            trainer["session"] + 1,
            trainer["stream"],
        )
        self.saved = self.step
        self.stream.restore(self.stream_state)
        restore_rng(state["rng"])
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.run.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": {
                "step": self.step,
                "session": self.session,
                "stream": self.stream_state,
                "data": self.fingerprint,
            },
            "rng": capture_rng(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
        }


def _step_seed(seed: int, step: int) -> int:
    """Of all that a step draws (gating noise), which neither a resumed loader nor an evaluation in between changes."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def _broken_router(routing: RoutingWindow) -> str:
    """Where the first router stands whose logits were not finite, for the sentence of a diverged step."""
    if routing.sum is None:
        return ""
    broken = (~routing.sum.logit_NE.isfinite().all(1)).nonzero().flatten().tolist()
    return f"; router logits are not finite from layer of experts {broken[0]} (from 0) on" if broken else ""


@contextmanager
def _stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run after the current step, saved; the second one kills it.

    A second SIGTERM does nothing where there are other processes: a scheduler and torchrun may both send one.
    """

    def handler(number: int, frame: Any) -> None:
        trainer.stop_requested = True
        alone = number == signal.SIGINT or not dist.is_initialized()
        signal.signal(number, previous[number] if alone else signal.SIG_IGN)

    previous: dict[int, Any] = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
