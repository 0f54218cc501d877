"""Losses of a record: means over the steps since the last one, whatever lies between them."""

import json

import pytest
import torch

from mmoe.losses.report import LossReport
from mmoe.monitoring.loss_window import LossWindow


def report(loss: float, items: list[tuple[float, float]], **terms: float) -> LossReport:
    """One source, two modalities: sum and number of the items of `ce`; `pairs` and `correct` of `contrastive`."""
    return LossReport(
        torch.tensor(loss),
        torch.tensor(loss),
        {name: torch.tensor(value) for name, value in terms.items()},
        {"ce": torch.tensor([items], dtype=torch.float64)},
        {"contrastive": torch.tensor([4.0, 1.0], dtype=torch.float64)} if "contrastive" in terms else {},
    )


STEPS = [
    report(3.0, [(6.0, 2.0), (0.0, 0.0)], ce=2.5, contrastive=0.5),
    report(2.0, [(2.0, 2.0), (9.0, 3.0)], ce=2.0),  # a step without pairs
    report(1.0, [(0.0, 0.0), (1.0, 1.0)], ce=0.5, contrastive=1.5),
]


def window(steps: list[LossReport]) -> LossWindow:
    made = LossWindow()
    for step in steps:
        made.add(step)
    return made


def test_a_loss_is_the_mean_of_the_steps_and_a_term_that_of_the_steps_which_have_it() -> None:
    mean = window(STEPS).mean()
    assert float(mean.loss) == 2.0
    assert {name: float(value) for name, value in mean.terms.items()} == {
        "ce": pytest.approx(5 / 3),
        "contrastive": 1.0,
    }
    assert mean.by_source("ce") == {0: 18.0 / 8.0}  # every item alike, not every step
    assert mean.events["contrastive"].tolist() == [pytest.approx(8 / 3), pytest.approx(2 / 3)]


def test_of_no_step_there_is_no_mean() -> None:
    assert LossWindow().mean() is None


def test_one_step_is_itself_bit_for_bit() -> None:
    (step, mean) = STEPS[0], window(STEPS[:1]).mean()
    assert float(mean.loss) == float(step.loss)
    assert {n: float(v) for n, v in mean.terms.items()} == {n: float(v) for n, v in step.terms.items()}
    assert all(torch.equal(mean.items[name], table) for name, table in step.items.items())


@pytest.mark.parametrize("cut", range(4))
def test_a_checkpoint_between_two_records_changes_no_bit(cut: int) -> None:
    before = window(STEPS[:cut])
    after = LossWindow()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())) if cut else {})
    for step in STEPS[cut:]:
        after.add(step)
    a, b = after.mean(), window(STEPS).mean()
    assert torch.equal(a.loss, b.loss) and a.terms == b.terms
    assert torch.equal(a.items["ce"], b.items["ce"]) and torch.equal(a.events["contrastive"], b.events["contrastive"])
