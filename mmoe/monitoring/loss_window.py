"""Averages the losses of the steps between two records."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmoe.losses.report import LossReport

_PARTS = ("terms", "items", "events")


class LossWindow:
    """Averages the loss reports of the steps since it was new.

    `loss` is its mean over the steps, a term that over the steps which have it; events are counts a step, and items add
    up, so that what is made of them weighs every item alike. Sums are float64, and stay where the reports are until
    they are asked for.
    """

    def __init__(self) -> None:
        self._steps, self._having = 0, Counter[str]()
        self._sum = LossReport.zero()

    def add(self, report: LossReport) -> None:
        """Count in the report of a step."""
        device = report.loss.device
        self._sum = _map(report, Tensor.double) + _map(self._sum, lambda value: value.to(device))
        self._steps += 1
        self._having.update(report.terms.keys())

    def mean(self) -> LossReport | None:
        """Return the report of a mean step; None where there has been no step."""
        if not self._steps:
            return None
        total = self._sum
        return LossReport(
            total.loss_for_backward / self._steps,
            total.loss / self._steps,
            {name: value / self._having[name] for name, value in total.terms.items()},
            total.items,
            {name: value / self._steps for name, value in total.events.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, as JSON can hold them."""
        parts = {part: {name: value.tolist() for name, value in getattr(self._sum, part).items()} for part in _PARTS}
        return {"steps": self._steps, "having": dict(self._having), "loss": float(self._sum.loss), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; nothing of a state that is empty."""
        if state:
            loss = _tensor(state["loss"])
            parts = {part: {name: _tensor(value) for name, value in state[part].items()} for part in _PARTS}
            self._steps, self._having = state["steps"], Counter(state["having"])
            self._sum = LossReport(loss, loss, **parts)


def _map(report: LossReport, change: Callable[[Tensor], Tensor]) -> LossReport:
    parts = {part: {name: change(value) for name, value in getattr(report, part).items()} for part in _PARTS}
    loss = change(report.loss)
    return LossReport(loss, loss, **parts)


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
