import pytest
import torch
from pydantic import ValidationError

from mmoe.precision.config import PrecisionConfig


@pytest.mark.parametrize(
    ("compute", "parameters", "products"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float64", torch.float64, torch.float64),
    ],
)
def test_parameters_and_products(compute: str, parameters: torch.dtype, products: torch.dtype) -> None:
    config = PrecisionConfig(compute=compute)
    layer = torch.nn.Linear(4, 4).to(config.parameter_dtype)
    with config.autocast("cpu"):
        out = layer(torch.ones(2, 4, dtype=config.parameter_dtype))
        assert not torch.is_autocast_enabled("cuda")
    assert layer.weight.dtype == parameters and out.dtype == products
    assert not torch.is_autocast_enabled("cpu")
    out.sum().backward()
    assert layer.weight.grad.dtype == parameters


def test_precisions_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValidationError):
        PrecisionConfig(compute="float16")
