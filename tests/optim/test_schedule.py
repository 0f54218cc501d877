"""Schedules against transformers' and torch's own, and the properties all of them share.

Ours is asked for 0-based steps and reaches the peak at the end of the warmup and the minimum at the end of the
run; transformers' factor after s + 1 steps is the same number.
"""

import pytest
import torch
import transformers.optimization as peers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmoe.errors import ConfigError
from mmoe.optim.batch import BatchArithmetic
from mmoe.optim.schedule import Schedule, ScheduleConfig, Stretch

PEAK, T, W = 3e-3, 200, 20
GB = 1024


def batch(iterations: int = T, size: int = GB) -> BatchArithmetic:
    return BatchArithmetic(size // 2, 1, 2, 1, iterations * size + size // 3)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def factors(scheduler: torch.optim.lr_scheduler.LambdaLR) -> list[float]:
    return [PEAK * scheduler.lr_lambdas[0](step) for step in range(1, T + 1)]


def ours(**fields) -> list[float]:
    schedule = ScheduleConfig(warmup=Stretch(steps=W), start=0.0, **fields).build(PEAK, batch())
    return [schedule(step) for step in range(T)]


def test_cosine_is_transformers() -> None:
    peer = peers.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), W, T, min_lr_rate=0.1)
    assert ours(kind="cosine") == pytest.approx(factors(peer), rel=1e-9)
    peer = peers.get_cosine_schedule_with_warmup(optimizer(), W, T)
    assert ours(kind="cosine", minimum=0.0) == pytest.approx(factors(peer), rel=1e-9, abs=1e-15)


def test_linear_is_transformers() -> None:
    peer = peers.get_linear_schedule_with_warmup(optimizer(), W, T)
    assert ours(kind="linear", minimum=0.0) == pytest.approx(factors(peer), rel=1e-9, abs=1e-15)


def test_warmup_constant_is_transformers() -> None:
    peer = peers.get_constant_schedule_with_warmup(optimizer(), W)
    assert ours(kind="constant") == pytest.approx(factors(peer), rel=1e-9)


def test_wsd_is_transformers() -> None:
    peer = peers.get_wsd_schedule(
        optimizer(), W, num_decay_steps=60, num_training_steps=T, decay_type="linear", min_lr_ratio=0.1
    )
    # Their warmup starts at the minimum instead of zero.
    assert ours(kind="wsd", decay=Stretch(steps=60))[W:] == pytest.approx(factors(peer)[W:], rel=1e-9)


def test_one_cycle_is_torch() -> None:
    sgd = optimizer()
    peer = torch.optim.lr_scheduler.OneCycleLR(
        sgd, PEAK, total_steps=T, pct_start=W / T, div_factor=25, final_div_factor=4, cycle_momentum=False
    )
    rates = []
    for _ in range(T):
        rates.append(peer.get_last_lr()[0])
        if len(rates) < T:
            sgd.step()
            peer.step()
    config = ScheduleConfig(kind="one_cycle", warmup=Stretch(steps=W), start=1 / 25, minimum=1 / 100)
    schedule = config.build(PEAK, batch())
    assert [schedule(step) for step in range(T)] == pytest.approx(rates, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["cosine", "linear", "one_cycle", "wsd", "constant"]),
    steps=st.integers(1, 300),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    start=st.floats(0.001, 1),
    minimum=st.floats(0, 1),
)
def test_every_schedule_rises_to_the_peak_and_never_again(
    kind: str, steps: int, shares: tuple[float, float], start: float, minimum: float
) -> None:
    spans = {}
    if kind == "wsd":
        spans["decay"] = Stretch(fraction=shares[1])
    elif kind != "constant":
        spans["hold"] = Stretch(fraction=shares[1])
    config = ScheduleConfig(kind=kind, warmup=Stretch(fraction=shares[0]), start=start, minimum=minimum, **spans)
    try:
        schedule = config.build(PEAK, batch(steps))
    except ConfigError:  # two halves that both round up
        assert round(shares[0] * steps) + round(shares[1] * steps) > steps
        return
    rates, warmup = [schedule(step) for step in range(steps)], schedule.warmup
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert all(a >= b - 1e-15 for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    if warmup:
        assert rates[warmup - 1] == pytest.approx(PEAK)
        assert rates[0] >= start * PEAK * (1 - 1e-12)
    if kind == "constant" or (kind == "wsd" and not schedule.decay):
        assert rates[-1] == pytest.approx(PEAK)
    elif warmup < steps - schedule.hold or schedule.hold:
        assert rates[steps - schedule.hold - 1 :][-1] == pytest.approx(minimum * PEAK, abs=1e-15)
    assert schedule(steps + 50) == rates[-1]


def test_the_warmup_starts_at_one_percent() -> None:
    schedule = ScheduleConfig(warmup=Stretch(steps=500)).build(1.0, batch(1000))
    assert [schedule(s) for s in (0, 3, 4, 5, 249, 499)] == pytest.approx([0.01, 0.01, 0.01, 0.012, 0.5, 1.0])


def test_the_cooldown_is_constant_and_follows_the_last_step_of_the_decay() -> None:
    rates = ours(kind="cosine", hold=Stretch(steps=30))
    assert rates[T - 31 :] == pytest.approx([0.1 * PEAK] * 31)
    assert rates[T - 32] > 0.1 * PEAK


def test_warmup_in_positions_keeps_its_length_when_the_batch_doubles() -> None:
    """Recipes: 2B and 3B positions are 954 and 715 steps of the dense family's batches."""
    for positions, size, steps in ((2 * 10**9, 2**21, 954), (3 * 10**9, 2**22, 715)):
        span = Stretch(positions=positions)
        assert span.resolve(batch(10**5, size)) == steps
        assert span.resolve(batch(10**5, 2 * size)) == pytest.approx(steps / 2, abs=1)
    assert Stretch(fraction=0.02).resolve(batch(1000)) == 20
    assert Stretch(steps=3000).resolve(batch(10**5)) == 3000


def test_the_length_of_the_decay_is_derived_from_the_budget() -> None:
    for iterations in (100, 317):
        schedule = ScheduleConfig().build(PEAK, batch(iterations))
        assert schedule.iterations == iterations
        assert schedule(iterations - 1) == pytest.approx(0.1 * PEAK) and schedule(iterations - 2) > 0.1 * PEAK


def test_a_schedule_is_a_pure_function_of_the_step() -> None:
    schedule = ScheduleConfig().build(PEAK, batch())
    assert [schedule(s) for s in reversed(range(T))] == [schedule(s) for s in range(T)][::-1]
    assert schedule == Schedule("cosine", PEAK, T, 0.01, 0.1, 4, 0, 0)


@pytest.mark.parametrize("fields", [{}, {"steps": 3, "fraction": 0.1}, {"steps": 3, "positions": 7}])
def test_a_span_is_given_in_exactly_one_unit(fields: dict) -> None:
    with pytest.raises(ValidationError, match="exactly one of steps, positions and fraction"):
        Stretch(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "wsd"}, "optim.schedule.decay and optim.schedule.kind: wsd belong together"),
        ({"kind": "cosine", "decay": {"steps": 3}}, "optim.schedule.decay and optim.schedule.kind: wsd"),
        ({"kind": "constant", "hold": {"steps": 3}}, "optim.schedule.hold is time at the minimum"),
    ],
)
def test_spans_that_the_shape_does_not_have_are_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ScheduleConfig.model_validate(fields)


def test_spans_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="warmup 150 .* hold 60 steps do not fit the 200 steps"):
        ScheduleConfig(warmup=Stretch(steps=150), hold=Stretch(steps=60)).build(PEAK, batch())
