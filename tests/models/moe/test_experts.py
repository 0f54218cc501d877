import pytest
import torch
import torch.nn.functional as F

from mmoe.errors import ConfigError
from mmoe.models.moe.experts import Experts

SIZES = [5, 0, 11, 1]  # an expert without a row among them


def experts(engine: str) -> tuple[Experts, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = Experts(len(SIZES), 16, 24, engine)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made, torch.randn(sum(SIZES), 16), torch.tensor(SIZES).cumsum(0).int()


def test_each_group_goes_through_the_swiglu_of_its_expert():
    made, x, ends = experts("loop")
    made, x = made.double(), x.double()
    expected = [
        (F.silu(rows @ made.gate[e]) * (rows @ made.up[e])) @ made.down[e] for e, rows in enumerate(x.split(SIZES))
    ]
    torch.testing.assert_close(made(x, ends), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 0, 0], [0, 0, 0, 9]], ids=str)
def test_grouped_mm_equals_the_loop_in_values_and_gradients(sizes):
    results = []
    for engine in ("loop", "grouped_mm"):
        made, _, _ = experts(engine)
        torch.manual_seed(1)
        x = torch.randn(sum(sizes), 16, requires_grad=True)
        out = made(x, torch.tensor(sizes).cumsum(0).int())
        weights = torch.randn_like(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *made.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_expert_without_a_row_gets_a_zero_gradient():
    for engine in ("loop", "grouped_mm"):
        made, x, ends = experts(engine)
        (made(x, ends) * torch.randn(len(x), 16)).sum().backward()
        for parameter in made.parameters():
            assert (parameter.grad[1] == 0).all() and (parameter.grad[0] != 0).any()


@pytest.mark.parametrize("engine", ["loop", "grouped_mm"])
def test_autocast_reaches_the_products(engine):
    made, x, ends = experts(engine)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x, ends)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), made(x, ends), rtol=0.05, atol=0.05)
    (out * torch.randn_like(out)).sum().backward()
    assert made.gate.grad.dtype is torch.float32 and made.gate.grad.isfinite().all()


def test_grouped_mm_refuses_float64_with_the_remedy():
    made, x, ends = experts("grouped_mm")
    with pytest.raises(ConfigError, match="set it to .*loop"):
        made.double()(x.double(), ends)
