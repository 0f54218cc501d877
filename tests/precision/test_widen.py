import pytest
import torch

from mmoe.precision.upcast import upcast


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_nothing_below_float32_and_nothing_narrowed(narrow: torch.dtype, wide: torch.dtype) -> None:
    x = torch.ones(3, dtype=narrow, requires_grad=True)
    assert upcast(x).dtype == wide
    assert (upcast(x) is x) == (narrow == wide)
    assert torch.autograd.grad(upcast(x).sum(), x)[0].dtype == narrow
