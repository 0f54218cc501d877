import pytest
import torch

from mmoe.models.decoder import ModelConfig
from mmoe.models.init import initial_value
from mmoe.models.moe.layer import MoEConfig
from tests.models.random_batch import INPUTS, random_batch

MOE = MoEConfig(n_experts=4, top_k=2, intermediate_size=32, layer_freq=2, n_shared_experts=1)
CONFIG = ModelConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=128, moe=MOE, tie_embeddings=False, qk_norm=True
)


def values(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(config.build(INPUTS, seed).named_parameters())


def test_values_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = values()
    torch.manual_seed(2)
    again, other = values(), values(seed=1)
    dense = values(CONFIG.model_copy(update={"moe": None, "qk_norm": False, "tie_embeddings": True}))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name in dense:  # built in another order, with other modules around it
            assert torch.equal(value, dense[name]), name
    assert len(first.keys() & dense.keys()) > 15
    drawn = [name for name, value in first.items() if value.std() > 0]
    assert len({value.flatten()[0].item() for value in first.values()}) > len(drawn)
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_an_expert_does_not_depend_on_how_many_others_there_are():
    name = "decoder.blocks.1.feed_forward.experts.gate"
    few, many = (initial_value(name, torch.Size((n, 8, 4)), 0, 0.02, 2) for n in (2, 16))
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize(
    "name, std",
    [
        ("embeddings.token.weight", 0.02),
        ("embeddings.camera.weight", 0.02),
        ("unembedding.weight", 0.02),
        ("embeddings.values.vision.hidden.weight", 12**-0.5),
        ("decoder.blocks.0.attention.query.weight", 64**-0.5),
        ("decoder.blocks.0.attention.output.weight", 64**-0.5 / 2),
        ("decoder.blocks.0.feed_forward.gate.weight", 64**-0.5),
        ("decoder.blocks.0.feed_forward.down.weight", 128**-0.5 / 2),
        ("decoder.blocks.1.feed_forward.router.weight", 64**-0.5),
        ("decoder.blocks.1.feed_forward.experts.up", 64**-0.5),
        ("decoder.blocks.1.feed_forward.experts.down", 32**-0.5 / 2),
        ("decoder.blocks.1.feed_forward.shared.down.weight", 32**-0.5 / 2),
        ("embeddings.time.output.weight", 0),
        ("action.output.weight", 0),
        ("action.hidden.weight", 64**-0.5),
    ],
)
def test_widths(name, std):
    value = values()[name]
    assert value.std().item() == pytest.approx(std, rel=3 / value.numel() ** 0.5)


def test_norms_are_ones_and_biases_zeros():
    for name, value in values().items():
        if value.ndim == 1:
            assert (value == (1 if name.endswith("norm.weight") else 0)).all(), name


def test_hidden_states_are_of_order_one_and_labels_nearly_uniform():
    batch = random_batch(0)
    model = CONFIG.build(INPUTS, 0)
    logits = model.logits(model(batch).hidden[batch.labels >= 0])
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[batch.labels >= 0])
    uniform = torch.tensor(float(INPUTS.vocabulary_size)).log()
    torch.testing.assert_close(loss, uniform, rtol=0.03, atol=0)
