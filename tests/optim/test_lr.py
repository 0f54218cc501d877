import pytest
from pydantic import ValidationError

from mmoe.optim.lr import LearningRateConfig


@pytest.mark.parametrize(("rule", "power", "factor"), [("linear", None, 16), ("sqrt", None, 4), ("power", 0.75, 8)])
def test_the_rules_at_sixteen_times_the_batch(rule: str, power: float | None, factor: float) -> None:
    """The recipe's check is the square root: 6.0e-4 at 262,144 becomes 2.4e-3 at 4,194,304."""
    config = LearningRateConfig(peak=6e-4, reference_batch_positions=262_144, scaling_rule=rule, power=power)
    assert config.scaled_peak(4_194_304) == pytest.approx(6e-4 * factor, rel=1e-12)
    assert config.scaled_peak(262_144) == 6e-4


def test_without_a_rule_the_peak_stands() -> None:
    config = LearningRateConfig(peak=6e-4)
    assert config.scaled_peak(1) == config.scaled_peak(10**9) == 6e-4 and config.exponent == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"scaling_rule": "sqrt"}, "set optim.lr.reference_batch_positions too, or neither"),
        ({"reference_batch_positions": 10}, "set optim.lr.scaling_rule too, or neither"),
        ({"reference_batch_positions": 10, "scaling_rule": "power"}, "optim.lr.power and"),
        ({"reference_batch_positions": 10, "scaling_rule": "sqrt", "power": 0.6}, "optim.lr.power and"),
        ({"power": 0.6}, "optim.lr.power and"),
    ],
)
def test_half_a_rule_is_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LearningRateConfig(peak=1e-3, **fields)
