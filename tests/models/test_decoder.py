import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from mmoe.schema.batch import PackedBatch
from tests.models.random_batch import INPUTS, pack, random_batch, random_sequences

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "intermediate_size": 48}
MOE = {"n_experts": 4, "top_k": 2, "intermediate_size": 16}


def build(**changes) -> MultimodalModel:
    return ModelConfig(**SHAPE | {"moe": MoEConfig(**MOE)} | changes).build(INPUTS, seed=0)


def everything(model: MultimodalModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    output = model(batch)
    left, right = model.contrast(output.hidden, batch.pairs, batch.modality)
    result = {
        "hidden": output.hidden,
        "logits": model.logits(output.hidden[batch.labels >= 0]),
        "actions": model.actions(output.hidden.flatten(0, 1)[batch.action_index]),
        "left": left,
        "right": right,
    }
    if output.auxiliary is not None:
        result |= {"balance": output.auxiliary.balance_loss, "z": output.auxiliary.z_loss}
    return result


class SeenDtypes(TorchDispatchMode):
    """Which floating dtypes each operation returned."""

    def __init__(self):
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen.setdefault(tensor.dtype, set()).add(function.name())
        return out


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_float64_stays_float64_end_to_end(capacity_factor):
    moe = MoEConfig(**MOE, expert_backend="loop", n_shared_experts=1, capacity_factor=capacity_factor)
    model = build(moe=moe, qk_norm=True, bidirectional_slices=True).double()
    batch = next(b for b in map(random_batch, range(50)) if len(b.action_index) and len(b.pairs.group))
    with SeenDtypes() as dtypes:
        results = everything(model, batch)
        sum(x.square().sum() for x in results.values()).backward()
    assert {name: x.dtype for name, x in results.items()} == dict.fromkeys(results, torch.float64)
    assert dtypes.seen.keys() == {torch.float64}, dtypes.seen


def test_what_must_stay_wide_is_wide_under_autocast():
    model = build(qk_norm=True)
    batch = next(b for b in map(random_batch, range(50)) if len(b.action_index) and len(b.pairs.group))
    with SeenDtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        narrow = everything(model, batch)
    sensitive = ("softmax", "rsqrt", "cos", "sin", "pow", "exp", "attention", "sort", "norm", "mean", "entr")
    for operation in dtypes.seen[torch.bfloat16]:
        assert not any(name in operation for name in sensitive), operation
    assert {"aten::mm", "aten::_grouped_mm"} <= dtypes.seen[torch.bfloat16]
    assert narrow["logits"].dtype is torch.bfloat16
    wide = everything(model, batch)
    for name in ("hidden", "actions", "left", "balance"):  # in the mean: a near tie may go to another expert
        assert (narrow[name].float() - wide[name]).abs().mean() < 0.05, name


def test_bfloat16_gradients_follow_float32():
    batch = random_batch(4, documents=6)
    gradients = []
    for enabled in (False, True):
        model = build(moe=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results = everything(model, batch)
            loss = sum(x.float().square().mean() for x in results.values())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_model_is_the_same_with_either_attention_backend(bidirectional):
    batch = random_batch(8)
    documents, dense = (
        everything(build(attention=name, bidirectional_slices=bidirectional), batch)
        for name in ("sdpa_documents", "dense")
    )
    for name, value in documents.items():
        if name == "intermediate_size":
            value, dense[name] = value[batch.valid], dense[name][batch.valid]
        torch.testing.assert_close(value, dense[name], rtol=1e-5, atol=1e-5)


def test_padding_is_finite_and_changes_nothing():
    sequences = random_sequences(3, 2, 3)
    short, long = pack(sequences), pack(sequences, length=3 * pack(sequences).shape[1])
    model = build()
    results = []
    for batch in (short, long):
        output = model(batch)
        assert output.hidden.isfinite().all()
        loss = output.hidden[batch.valid].square().sum() + output.auxiliary.balance_loss + output.auxiliary.z_loss
        model.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (model.embeddings.token.weight.grad[0] == 0).all()  # pad


def test_a_batch_of_padding_alone_gives_zero_losses():
    batch = pack([[], []], length=8)
    output = build()(batch)
    assert output.hidden.isfinite().all()
    assert output.auxiliary.balance_loss == output.auxiliary.z_loss == 0
    assert output.routing.load_NMSE.sum() == output.routing.tokens_N.sum() == 0
    (output.hidden.sum() + output.auxiliary.z_loss).backward()


def test_experts_stand_in_the_layers_that_the_config_says():
    config = ModelConfig(**SHAPE | {"n_layers": 7}, moe=MoEConfig(**MOE, layer_freq=2, first_k_dense=2))
    names = {name for name, _ in config.build(INPUTS, 0).named_parameters()}
    layers = {int(name.split(".")[2]) for name in names if "experts" in name}
    assert layers == {3, 5}
    assert build(moe=None)(random_batch(0)).routing is None


def test_router_losses_are_means_over_the_layers_of_experts():
    model = build(n_layers=3, moe=MoEConfig(**MOE, first_k_dense=1))
    layers = [block.feed_forward for block in model.decoder.blocks[1:]]
    routed = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, out: routed.append(out[1]))
    output = model(random_batch(1))
    assert len(routed) == 2 and routed[0].z_loss != routed[1].z_loss
    for name in ("balance_loss", "z_loss"):
        mean = (getattr(routed[0], name) + getattr(routed[1], name)) / 2
        torch.testing.assert_close(getattr(output.auxiliary, name), mean)
    for number, layer in enumerate(routed):
        assert torch.equal(output.routing.load_NMSE[number], layer.statistics.load_NMSE[0])


def test_statistics_are_those_of_training_and_counted_once_under_recomputation():
    batch = random_batch(2)
    model = build()
    reference = model(batch).routing
    assert model.eval()(batch).routing is None
    model.train()
    for block in model.decoder.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    output = model(batch)
    (output.hidden.square().sum() + output.auxiliary.balance_loss).backward()
    for name, value in vars(reference).items():
        assert torch.equal(getattr(output.routing, name), value), name
    assert (output.routing.tokens_N == batch.valid.sum()).all()


def test_recomputation_gives_the_same_gradients():
    batch = random_batch(2)
    gradients = []
    for recompute in (False, True):
        model = build()
        if recompute:
            for block in model.decoder.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        output = model(batch)
        (output.hidden.square().sum() + output.auxiliary.balance_loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_heads_that_have_no_input_are_not_built():
    model = ModelConfig(**SHAPE).build(ModelInputs(vocabulary_size=50), seed=0)
    assert model.action is None and not model.embeddings.values
    assert model.unembedding is None
    untied = ModelConfig(**SHAPE, tie_embeddings=False).build(ModelInputs(vocabulary_size=50), seed=0)
    assert untied.unembedding.weight.shape == (50, 32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"n_heads": 6, "n_kv_heads": 2}, "set head_dim"),
        ({"n_heads": 1, "n_kv_heads": 1, "head_dim": 5}, "make it even"),
        ({"d_model": 36, "n_heads": 2, "moe": MoEConfig(**MOE)}, "grouped_mm needs a multiple of 8"),
        ({"moe": MoEConfig(**MOE, first_k_dense=2)}, "leave none"),
        ({"attention": "flash"}, "sdpa_documents"),
    ],
)
def test_impossible_shapes_are_refused_with_a_remedy(changes, words):
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**SHAPE | changes)
