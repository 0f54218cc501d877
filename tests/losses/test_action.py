import torch
import torch.nn.functional as F

from mmoe.losses.action import squared_error


def test_equals_torch_where_the_mask_is_true_and_reads_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 3, 2, generator=generator) > 0.5
    mask[2] = False
    target[~mask] = torch.nan
    errors = squared_error(predicted, target, mask)
    assert errors.shape == (4,) and errors[2] == 0
    expected = F.mse_loss(predicted[mask], target[mask], reduction="sum")
    torch.testing.assert_close(errors.sum(), expected)
    got = torch.autograd.grad(errors.sum(), predicted)[0]
    wanted = torch.autograd.grad(expected, predicted)[0]
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))


def test_half_precision_predictions_are_compared_in_float32() -> None:
    predicted = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    errors = squared_error(predicted, torch.full((1, 1, 1), 1.001), torch.ones(1, 1, 1, dtype=torch.bool))
    assert errors.dtype == torch.float32 and 0 < float(errors) < 2e-6
