"""Does one optimizer step: forward, losses, backward, a decision, clip, update."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mmoe.data.load.stream import StepData
from mmoe.errors import DivergenceError
from mmoe.losses.report import LossReport
from mmoe.models.moe.balance import update_expert_bias
from mmoe.models.moe.routing import RoutingWindow
from mmoe.optim.adamw import clip_gradients
from mmoe.schema.batch import PackedBatch
from mmoe.training.decision import Decision
from mmoe.training.gradients import StepGradients, StepSetting, step_gradients
from mmoe.training.run import Run
from mmoe.training.state import TrainState

Decide = Callable[[StepGradients], Decision]


@dataclass(frozen=True)
class StepResult:
    """Says what one optimizer step did.

    `losses` are sums over items divided by the planned counts. Only where `decision` is GO did the step change the
    weights. After ROLL_BACK and STOP the run's state is as before it.
    """

    step: int  # 1-based: the number of steps done, with this one
    decision: Decision
    losses: LossReport
    lr: float
    grad_norm: float  # before clipping
    router_gradients: torch.Tensor | None  # [MoE layers, experts], before clipping; see router_gradient_norms
    positions: int
    useful_positions: int
    seconds: float
    data_wait_seconds: float  # of `seconds`, spent waiting for batches
    routing: RoutingWindow
    data: StepData


def go(gradients: StepGradients) -> Decision:
    """Return `Decision.GO`, to take the step whatever its gradients."""
    return Decision.GO


def train_step(
    state: TrainState, data: StepData, run: Run, setting: StepSetting, decide: Decide = go, waited: float = 0.0
) -> StepResult:
    """Do one optimizer step of `run` on `data`, for which the caller has `waited` so many seconds.

    `decide` is asked once, with the gradients, and answers the same on every rank. Raises DivergenceError where it says
    GO and the gradient norm is not finite; no weight is changed then.
    """
    started = time.perf_counter()
    model, config, batch = state.model, run.config, run.resolved.batch
    model.train()
    denominators = setting.terms.denominators(data.counts, batch.sequences)
    batches = _Timed(data.batches)
    gradients = step_gradients(model, batches, denominators, setting, _step_seed(config.training.seed, state.step))
    routing = RoutingWindow()
    routing.add(gradients.routing)
    decision = decide(gradients)
    lr = state.schedule(state.step)
    if decision is Decision.GO:
        _check_finite(gradients, routing, state.step + 1, run)
        _update(state, gradients, lr, run)
    state.optimizer.zero_grad()
    if decision <= Decision.SKIP:
        state.step += 1
        state.stream.quarantine.settle(run.ranks.sum_over_data)
        state.position = state.stream.state(data)
    return StepResult(
        step=state.step,
        decision=decision,
        losses=gradients.report,
        lr=lr,
        grad_norm=float(gradients.norm),
        router_gradients=gradients.router_norms_NE,
        positions=batch.global_batch_positions,
        useful_positions=data.counts.positions,
        seconds=waited + time.perf_counter() - started,
        data_wait_seconds=waited + batches.seconds,
        routing=routing,
        data=data,
    )


def _update(state: TrainState, gradients: StepGradients, lr: float, run: Run) -> None:
    """Clip, set the rate, and change weights, optimizer state and the routers' bias."""
    model, config = state.model, run.config
    clip_gradients(model.parameters(), gradients.norm, config.optim.clip)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    routers, moe = model.decoder.routers, config.model.moe  # a pipeline stage may have none
    if routers and moe is not None and moe.bias_update_rate:
        update_expert_bias(routers, gradients.loads.total(), moe.bias_update_rate)


def _check_finite(gradients: StepGradients, routing: RoutingWindow, step: int, run: Run) -> None:
    if gradients.norm.isfinite():
        return
    terms = ", ".join(f"{name} {float(value):.4g}" for name, value in gradients.report.terms.items())
    lower = f"optim.lr.peak={run.config.optim.lr.peak / 2:g}"
    raise DivergenceError(
        f"{run.folder}: the gradient norm of step {step} is {float(gradients.norm)} ({terms})"
        f"{_broken_router(routing)}; no weight was changed: go on from its last checkpoint at a lower rate by "
        f"`mmoe train {shlex.quote(str(run.folder))} --set {lower}`, from an earlier one by --from-step too, or where "
        f"it has none begin anew with {lower}"
    )


def _broken_router(routing: RoutingWindow) -> str:
    """Where the first router stands whose logits were not finite, for the sentence of a diverged step."""
    if routing.sum is None:
        return ""
    broken = (~routing.sum.logit_NE.isfinite().all(1)).nonzero().flatten().tolist()
    return f"; router logits are not finite from layer of experts {broken[0]} (from 0) on" if broken else ""


def _step_seed(seed: int, step: int) -> int:
    """Of all that a step draws (gating noise), which neither a resumed loader nor an evaluation in between changes."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


class _Timed(Iterator[PackedBatch]):
    """The batches of a step, with the `seconds` that they were waited for."""

    def __init__(self, batches: Iterator[PackedBatch]) -> None:
        self._batches, self.seconds = iter(batches), 0.0

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started
