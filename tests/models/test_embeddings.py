import math
from dataclasses import replace

import pytest
import torch

from mmoe.errors import ConfigError
from mmoe.models.embeddings import PERIODS, SHORTEST_PERIOD_NS, Embeddings, ModelInputs, TimeEmbedding
from mmoe.schema.batch import Values
from mmoe.schema.modality import Modality
from tests.models.random_batch import INPUTS, random_batch


@pytest.fixture
def embeddings() -> Embeddings:
    torch.manual_seed(0)
    return Embeddings(INPUTS, 24)


@pytest.fixture
def batch():
    return next(b for b in map(random_batch, range(50)) if len(b.values[Modality.STATE].index) > 4)


def test_each_position_is_the_sum_of_what_it_has(embeddings, batch):
    out = embeddings(batch).flatten(0, 1)
    ids, camera, offset = (x.flatten().tolist() for x in (batch.token_ids, batch.camera, batch.offset_ns))
    vectors = {}
    for kind, values in batch.values.items():
        projected = embeddings.values[kind.name.lower()](values.values)
        vectors |= {int(at): (kind, vector) for at, vector in zip(values.index, projected) if at >= 0}
    for at in range(len(ids)):
        expected = embeddings.token.weight[ids[at]]
        if at in vectors:
            kind, vector = vectors[at]
            expected = vector + (expected if kind == Modality.STATE else 0)
        if camera[at] >= 0:
            expected = expected + embeddings.camera.weight[camera[at]]
        if offset[at]:
            expected = expected + embeddings.time(torch.tensor(offset[at]))
        torch.testing.assert_close(out[at], expected, rtol=1e-5, atol=1e-6)


def test_spare_rows_are_never_read(embeddings, batch):
    noisy = {
        kind: Values(torch.where(v.index[:, None] < 0, torch.inf, v.values), v.index)
        for kind, v in batch.values.items()
    }
    assert torch.equal(embeddings(replace(batch, values=noisy)), embeddings(batch))


def test_a_placeholder_that_is_replaced_gives_its_embedding_no_gradient(embeddings, batch):
    embeddings(batch).square().sum().backward()
    vision = batch.token_ids.flatten()[batch.values[Modality.VISION].index[0]]
    assert (embeddings.token.weight.grad[vision] == 0).all()
    assert (embeddings.values["vision"].hidden.weight.grad != 0).any()


@pytest.mark.parametrize("time_ns", [1, -1, 7_600_000, -(10**9), 1_480_000_000_123_456_789, -(2**62) + 1])
def test_time_features_are_exact_at_any_magnitude(time_ns):
    features = TimeEmbedding(8).features(torch.tensor(time_ns))
    for k in range(PERIODS):
        period = SHORTEST_PERIOD_NS * 2**k
        phase = 2 * math.pi * ((time_ns % period) / period)  # python integers: nothing is rounded before
        assert features[k].item() == pytest.approx(math.sin(phase), abs=1e-12)
        assert features[PERIODS + k].item() == pytest.approx(math.cos(phase) - 1, abs=1e-12)


def test_times_that_float_would_merge_stay_apart_and_zero_adds_nothing():
    time = TimeEmbedding(8)
    a, b = time(torch.tensor([1_480_000_000_123_456_789, 1_480_000_000_123_556_789]))
    assert not torch.equal(a, b)
    assert (time(torch.tensor([0])) == 0).all()


def test_vectors_that_the_model_was_not_built_for_are_refused(batch):
    blind = Embeddings(ModelInputs(INPUTS.vocabulary_size, inertial_dim=6, state_dim=5), 24)
    with pytest.raises(ConfigError, match="VISION"):
        blind(batch)
