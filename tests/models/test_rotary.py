import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mmoe.models.rotary import RotaryTables

HEAD = 16


def rotate(position: torch.Tensor, x: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    return RotaryTables.from_positions(position, HEAD, theta, x.dtype).rotate(x)


def test_plain_text_is_ordinary_rope_to_the_bit():
    config = LlamaConfig(
        hidden_size=HEAD * 2, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    ids = torch.randint(0, 9000, (2, 50))
    q, k = torch.randn(2, 50, 2, HEAD), torch.randn(2, 50, 1, HEAD)
    cos, sin = LlamaRotaryEmbedding(config)(q, ids)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    position = ids[..., None].expand(-1, -1, 3)
    assert torch.equal(rotate(position, q, 5e5), expected[0])
    assert torch.equal(rotate(position, k, 5e5), expected[1])


def test_scores_depend_on_the_difference_of_positions_on_each_axis_alone():
    q, k = torch.randn(2, 1, 1, 1, HEAD, dtype=torch.float64)

    def score(at: tuple, seen: tuple) -> torch.Tensor:
        return (rotate(torch.tensor([[at]]), q) * rotate(torch.tensor([[seen]]), k)).sum()

    torch.testing.assert_close(score((9, 5, 7), (4, 3, 1)), score((109, 35, 8), (104, 33, 2)))
    for other in [(5, 3, 1), (4, 4, 1), (4, 3, 2)]:
        assert (score((9, 5, 7), (4, 3, 1)) - score((9, 5, 7), other)).abs() > 1e-6


def test_tables_are_float32_or_wider():
    position = torch.full((1, 1, 3), 8191)
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        tables = RotaryTables.from_positions(position, HEAD, 10_000.0, dtype)
        assert tables.cos.dtype is tables.sin.dtype is expected
