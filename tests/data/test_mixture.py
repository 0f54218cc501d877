"""Shares of positions by temperature, weight and cap; stages and what they expect."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmoe.data.plan.mixture import Mixture, SourceSize, StageConfig, check_mixture_stages
from mmoe.errors import ConfigError

SIZES = st.lists(st.integers(1, 10**13), min_size=1, max_size=8)


def mixture(sizes, end=10**6, caps=None, **stages) -> Mixture:
    caps = caps or [None] * len(sizes)
    sources = [SourceSize(f"s{i}", size, cap) for i, (size, cap) in enumerate(zip(sizes, caps, strict=True))]
    return Mixture(stages or {"all": StageConfig(temperature=1.0)}, sources, end)


@given(SIZES, st.floats(0.5, 8))
def test_shares_sum_to_one_and_keep_the_order_of_sizes(sizes, temperature):
    shares = mixture(sizes, all=StageConfig(temperature=temperature)).shares(0)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares[np.argsort(sizes, kind="stable")]) >= -1e-9).all()


@given(SIZES)
def test_temperature_one_is_proportional_and_a_high_one_flattens(sizes):
    shares = mixture(sizes, all=StageConfig(temperature=1.0)).shares(0)
    flat = mixture(sizes, all=StageConfig(temperature=1e6)).shares(0)
    assert np.allclose(shares, np.array(sizes) / sum(sizes), atol=1e-8)
    assert np.allclose(flat, 1 / len(sizes), rtol=1e-3)


def test_the_formula_of_the_recipes():
    shares = mixture([8_000, 1_000], all=StageConfig(temperature=3.0)).shares(0)
    assert shares[0] / shares[1] == pytest.approx(2.0)


def test_weights_are_scaled():
    plan = mixture([5, 5, 5], all=StageConfig(weights={"s2": 3.0, "s0": 1.0}))
    assert plan.shares(0).tolist() == [0.25, 0.0, 0.75]


def test_stages_follow_each_other_and_draw_from_their_own_sources():
    plan = mixture(
        [100, 300, 900],
        end=1000,
        cold=StageConfig(until=100, temperature=1.0, sources=("s0", "s1")),
        hot=StageConfig(temperature=2.0, sources=("s2",)),
    )
    assert [plan.stage(p).name for p in (0, 99, 100, 999, 5000)] == ["cold", "cold", "hot", "hot", "hot"]
    assert plan.shares(99).tolist() == [0.25, 0.75, 0.0] and plan.shares(100).tolist() == [0, 0, 1]
    assert [(s.start, s.stop) for s in plan.stages] == [(0, 100), (100, 1000)]


def test_a_temperature_moves_linearly_and_the_expectation_is_its_integral():
    plan = mixture([10**6, 10**3], end=8000, all=StageConfig(temperature=(1.0, 5.0)))
    for position, temperature in ((0, 1.0), (4000, 3.0), (8000, 5.0), (9000, 5.0)):
        assert plan.shares(position)[1] == pytest.approx(1 / (1 + 1000 ** (1 / temperature)), rel=1e-6)
    fine = np.mean([plan.shares(p + 0.5)[1] for p in range(8000)])
    assert plan.expected(plan.stages[0])[1].share == pytest.approx(fine, rel=1e-4)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.1, 3)), min_size=1, max_size=6), st.floats(0.5, 6))
def test_caps_hold_and_the_rest_keeps_its_proportions(sources, temperature):
    sizes, caps = zip(*sources, strict=True)
    end = max(1, int(sum(size * cap for size, cap in sources) * 0.7))
    assume(sum(size * cap for size, cap in sources) > end)
    plan = mixture(sizes, end, caps, all=StageConfig(temperature=temperature))
    expected = plan.expected(plan.stages[0])
    assert sum(e.share for e in expected) == pytest.approx(1)
    assert all(e.epochs <= cap * (1 + 1e-9) for e, cap in zip(expected, caps, strict=True))
    free = [i for i, (e, cap) in enumerate(zip(expected, caps, strict=True)) if e.epochs < cap * (1 - 1e-6)]
    wanted = plan.stages[0].wanted(0)
    if len(free) > 1:
        ratios = [expected[i].share / wanted[i] for i in free]
        assert ratios == pytest.approx([ratios[0]] * len(free))


def test_a_cap_counts_earlier_stages_and_is_announced():
    plan = mixture(
        [100, 10**6],
        end=4000,
        caps=[3.0, None],
        first=StageConfig(until=1000, weights={"s0": 0.2, "s1": 0.8}),
        second=StageConfig(weights={"s0": 0.5, "s1": 0.5}),
    )
    first, second = (plan.expected(stage)[0] for stage in plan.stages)
    assert first.epochs == pytest.approx(2.0) and second.epochs == pytest.approx(1.0)
    assert plan.warnings() == [
        "source s0 would be seen 15.0 times in stage second; its max_epochs 3 lowers its share from 50.00% to 3.33%"
    ]


def test_repetition_without_a_cap_is_announced():
    plan = mixture([100, 10**6], end=1460, hot=StageConfig(weights={"s0": 0.5, "s1": 0.5}))
    (sentence,) = plan.warnings()
    assert sentence.startswith("source s0 would be seen 7.3 times in stage hot; ")


def test_sources_that_cannot_fill_a_stage_are_refused():
    with pytest.raises(ConfigError, match="stage all needs 1,000 positions.*have 300 left"):
        mixture([100, 200], end=1000, caps=[1.0, 1.0])


def test_bad_stages_are_refused_with_the_reason():
    for bad in ({}, {"temperature": 1.0, "weights": {"a": 1.0}}, {"temperature": 0.0}, {"weights": {"a": 0.0}}):
        with pytest.raises(ValidationError):
            StageConfig(**bad)
    stage = StageConfig(until=5, temperature=1.0)
    with pytest.raises(ValueError, match="names source 'b'"):
        check_mixture_stages({"x": StageConfig(temperature=1.0, sources=("b",))}, ["a"])
    with pytest.raises(ValueError, match="not after"):
        check_mixture_stages({"x": stage, "y": stage}, ["a"])
    with pytest.raises(ValueError, match="has no `until`"):
        check_mixture_stages({"x": StageConfig(temperature=1.0), "y": stage}, ["a"])
