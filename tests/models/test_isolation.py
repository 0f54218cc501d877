"""Nothing crosses a document's border, and no label can be read off the input: proved with gradients."""

import itertools
from dataclasses import replace

import pytest
import torch

from mmoe.models.batch_context import BatchContext
from mmoe.models.decoder import ModelConfig, ModelOutput, MultimodalModel
from mmoe.models.moe.layer import MoEConfig
from mmoe.schema.batch import PackedBatch, Values
from mmoe.schema.modality import Modality
from tests.models.random_batch import INPUTS, pack, random_batch, random_sequences

MODELS = {
    "dense": None,
    "dropless": MoEConfig(n_experts=4, top_k=2, intermediate_size=16, n_shared_experts=1),
    "capacity": MoEConfig(
        n_experts=4, top_k=2, intermediate_size=16, capacity_factor=2.0
    ),  # = E / K: nothing is dropped
}
RULES = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])


def build(kind: str, bidirectional: bool) -> MultimodalModel:
    """Four layers with every parameter random: nothing is hidden behind a zero at initialization."""
    config = ModelConfig(
        d_model=32,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        intermediate_size=48,
        bidirectional_slices=bidirectional,
        moe=MODELS[kind],
    )
    model = config.build(INPUTS, seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.startswith(("embeddings.token", "embeddings.camera")):
            torch.nn.init.normal_(parameter)
    return model


def with_inputs(model: MultimodalModel, batch: PackedBatch) -> tuple[ModelOutput, list, list]:
    """The output, the inputs to differentiate by, and the flat position of each of their rows."""
    values = {kind: Values(v.values.requires_grad_(), v.index) for kind, v in batch.values.items()}
    batch = replace(batch, values=values)
    embedded = model.embeddings(batch)
    inputs = [embedded] + [v.values for v in values.values()]
    positions = [torch.arange(batch.document.numel())] + [v.index for v in values.values()]
    context = BatchContext.from_batch(batch, model.decoder.config, embedded.dtype)
    return model.decoder(embedded, context), inputs, positions


@RULES
@pytest.mark.parametrize("kind", MODELS)
def test_no_output_of_a_document_has_a_gradient_in_another(kind, bidirectional):
    model = build(kind, bidirectional)
    for seed in range(3):
        batch = random_batch(seed, sequences=2, documents=3)
        output, inputs, positions = with_inputs(model, batch)
        hidden = output.hidden.flatten(0, 1)
        borders = batch.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(borders):
            weights = torch.randn(stop - start, hidden.shape[1])
            gradients = torch.autograd.grad((hidden[start:stop] * weights).sum(), inputs, retain_graph=True)
            for gradient, position in zip(gradients, positions):
                inside = (position >= start) & (position < stop)
                assert (gradient.reshape(-1, gradient.shape[-1])[~inside] == 0).all()
            assert (gradients[0].flatten(0, 1)[start:stop] != 0).any(-1).all()


@RULES
@pytest.mark.parametrize("kind", MODELS)
def test_actions_logits_and_pairs_are_isolated_too(kind, bidirectional):
    model = build(kind, bidirectional)
    batch = next(b for b in (random_batch(s) for s in range(50)) if len(b.action_index) > 1 and len(b.pairs.group) > 1)
    output, inputs, positions = with_inputs(model, batch)
    document = (batch.document + 1000 * torch.arange(2)[:, None]).flatten()
    hidden = output.hidden.flatten(0, 1)
    actions = model.actions(hidden[batch.action_index])
    sides = model.contrast(output.hidden, batch.pairs, batch.modality)
    outputs = [(actions[m], batch.action_index[m]) for m in range(len(actions))]
    outputs += [(sides[s][p], batch.pairs.span[p, s, 0]) for p in range(len(sides[0])) for s in range(2)]
    for out, at in outputs:
        gradients = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        for gradient, position in zip(gradients, positions):
            elsewhere = (position < 0) | (document[position] != document[at])
            assert (gradient.reshape(-1, gradient.shape[-1])[elsewhere] == 0).all()
        assert (gradients[0] != 0).any()


@RULES
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("discrete", [False, True], ids=["chunks", "bins"])
def test_no_labeled_logit_sees_its_target_or_anything_later(kind, bidirectional, discrete):
    model = build(kind, bidirectional)
    batch = next(
        b for b in (random_batch(s, 1, 2, discrete) for s in range(100)) if (b.modality == Modality.ACTION).any()
    )
    output, inputs, positions = with_inputs(model, batch)
    labels = batch.labels.flatten()
    for at in (labels >= 0).nonzero().flatten().tolist():
        logit = model.logits(output.hidden.flatten(0, 1)[at])[labels[at]]
        for gradient, position in zip(torch.autograd.grad(logit, inputs, retain_graph=True), positions):
            assert (gradient.reshape(-1, gradient.shape[-1])[position > at] == 0).all()


def test_the_leak_that_the_label_rule_prevents_is_real():
    """Between the first and last VISION of a slice a position does see later ones: a label there would leak."""
    model = build("dense", bidirectional=True)
    batch = next(b for b in (random_batch(s, 1, 2) for s in range(100)) if (b.camera > 1).any())
    output, inputs, _ = with_inputs(model, batch)
    cameras = (batch.camera[0] == 1).nonzero().flatten()  # cam_*: STRUCTURE between two images of a slice
    camera_token = next(int(at) for at in cameras if batch.modality[0, at] == Modality.STRUCTURE)
    (gradient,) = torch.autograd.grad(output.hidden[0, camera_token].sum(), inputs[:1])
    assert (gradient[0, camera_token + 2 :] != 0).any()
    assert batch.labels[0, camera_token] == -100


@RULES
@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_unpacked(kind, bidirectional):
    model = build(kind, bidirectional)
    sequences = random_sequences(7, 3, 4)
    packed = model(pack(sequences)).hidden
    alone = model(pack([[document] for sequence in sequences for document in sequence])).hidden
    row = 0
    for b, sequence in enumerate(sequences):
        at = 0
        for document in sequence:
            ours, reference = packed[b, at : at + len(document)], alone[row, : len(document)]
            torch.testing.assert_close(ours, reference, rtol=2e-5, atol=2e-5)
            at, row = at + len(document), row + 1


@RULES
@pytest.mark.parametrize("kind", MODELS)
def test_a_nan_in_one_document_reaches_no_other(kind, bidirectional):
    model = build(kind, bidirectional)
    batch = next(b for b in map(random_batch, range(50)) if len(b.values[Modality.VISION].index) > 20)
    clean = model(batch).hidden.flatten(0, 1)
    vision = batch.values[Modality.VISION]
    poisoned = vision.values.clone()
    poisoned[0] = torch.nan
    values = batch.values | {Modality.VISION: Values(poisoned, vision.index)}
    hidden = model(replace(batch, values=values)).hidden.flatten(0, 1)
    border = batch.cu_seqlens.tolist()
    start, stop = next((a, b) for a, b in itertools.pairwise(border) if a <= vision.index[0] < b)
    assert hidden[start:stop].isnan().any()
    outside = torch.ones(len(hidden), dtype=torch.bool)
    outside[start:stop] = False
    torch.testing.assert_close(hidden[outside], clean[outside], rtol=2e-5, atol=2e-5)


def test_changing_a_target_changes_no_hidden_state():
    model = build("dropless", bidirectional=True)
    batch = next(b for b in map(random_batch, range(50)) if len(b.action_index) > 1)
    changed = replace(
        batch,
        action_target=batch.action_target + 5,
        action_mask=~batch.action_mask,
        labels=batch.labels.clamp(max=3),
        loss_weight=batch.loss_weight * 2,
    )
    assert torch.equal(model(batch).hidden, model(changed).hidden)
