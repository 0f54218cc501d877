"""A loss term with a head, from this file alone: how far a text token is from the start of its document."""

import numpy as np
import pytest
import torch
from torch import nn

from mmoe.config.load import validate
from mmoe.errors import ConfigError
from mmoe.losses.term import LOSS_TERMS, Items, LossContext, LossTerm, LossTermConfig, TermSums
from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.init import initial_value
from mmoe.planning.dry_run_plan import Plan
from mmoe.recipe.config import RunConfig
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality
from tests.distributed.compare import check, differences, one_process
from tests.distributed.step import MODEL, Case
from tests.distributed.test_training import LAYOUTS, figures, train, tree
from tests.models.random_batch import INPUTS
from tests.training.test_trainer import config
from tests.training.test_trainer import folder as folder


@LOSS_TERMS.register("distance")
class DistanceConfig(LossTermConfig):
    """Configures the squared error of a text token's distance from its document's start, over `scale`."""

    scale: float = 16.0

    def build(self) -> LossTerm:
        return DistanceTerm(self.label, self.weight, self.scale)


class DistanceTerm(LossTerm):
    event_names = ("near",)

    def __init__(self, name: str, weight: float, scale: float) -> None:
        super().__init__(name, weight)
        self.scale = scale

    def head(self, inputs: ModelInputs, d_model: int) -> nn.Module:
        return nn.Linear(d_model, 1)

    def denominator(self, counts: Counts, sequences: int) -> float:
        return float(counts.labels[Modality.TEXT])

    def compute(self, context: LossContext) -> TermSums | None:
        if not context.planned:
            return None
        batch = context.batch
        text = context.vocabulary.ranges["text"]
        labels = batch.labels.flatten()
        index = context.share(((labels >= text.start) & (labels < text.stop)).nonzero().squeeze(1))
        predicted = context.model.heads[self.name](context.hidden_BLD.flatten(0, 1)[index]).squeeze(1)
        errors = (predicted - batch.position[..., 0].flatten()[index] / self.scale).square()
        items = Items(errors, torch.ones_like(errors), index, torch.full_like(index, Modality.TEXT))
        return TermSums(errors.sum(), items, {"near": (errors < 1).sum()})


TERMS = {"terms": [{"kind": "distance", "weight": 0.5}]}
LOSSES = {"contrastive": {"weight": 0.3}, **TERMS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_have_the_term_of_one(two, layout):
    """Sequences without any text are among them, so a rank may have nothing of the term."""
    case = Case(extension=__name__, losses=TERMS, parallel=LAYOUTS[layout], micro=2, poor={1: "nothing"})
    expected = check(two, case, micro=2)
    assert expected["terms"]["distance"] > 0 and expected["events"]["distance"][0] > 0
    assert np.abs(expected["gradients"]["heads.distance.weight"]).max() > 0


def test_it_is_in_the_records_of_one_and_of_two_and_survives_a_resume(two, folder, tmp_path):
    def run_of(name: str, **parallel) -> RunConfig:
        configuration = tree(folder, tmp_path / name, **parallel).model_dump(mode="json")
        return validate(RunConfig, configuration | {"losses": LOSSES}, "test")

    expected = train(run_of("one"), 4)
    records = two.run(train, run_of("many"), 2)[0]
    records = two.run(train, run_of("many"), 4)[0]
    assert [record["session"] for record in records] == [0, 0, 1, 1]
    np.testing.assert_allclose(figures(records), figures(expected), rtol=1e-10)
    for ours, theirs in zip(records, expected, strict=True):
        found = {name for name in theirs if "distance" in name}
        assert {"loss_distance", "distance_text", "distance_near", "distance_from_text"} <= found
        for name in found:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), name


def test_a_dry_run_has_its_head_and_its_report(folder, tmp_path):
    def cost(**changes):
        plan = Plan.from_config(
            config(folder, tmp_path / "run", precision={"compute": "float32"}, **changes), 2, 1.0, 2, 512
        )
        return plan.costs([0])[0]

    with_term, without = cost(losses=LOSSES), cost(losses={"contrastive": {"weight": 0.3}})
    # This rank's part of Linear(32, 1); with FSDP2 one of its rows, and the bias, are another's.
    assert 0 < with_term.parameters - without.parameters <= 33
    assert sum(with_term.traffic.bytes.values()) > sum(without.traffic.bytes.values())
    assert with_term.flops > without.flops


@pytest.mark.parametrize(
    "terms, said",
    [
        ([{"kind": "distanse"}], "did you mean distance"),
        ([{"kind": "distance"}, {"kind": "distance"}], "two are named distance"),
        ([{"kind": "distance", "name": "ce"}], "two terms of the loss are named ce"),
        ([{"kind": "distance", "name": "a.b"}], "name"),
        ([{"kind": "distance", "name": "keys"}], "cannot be named keys"),
        ([{"kind": "distance", "scail": 2}], "scail"),
        ([{"kind": "distance", "weight": -1}], "weight"),
        (["distance"], "kind: "),
    ],
)
def test_what_cannot_be_a_term_is_refused_in_one_sentence(folder, tmp_path, terms, said):
    with pytest.raises(ConfigError, match=said):
        config(folder, tmp_path / "run", losses={"terms": terms})


class Held(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.norm, self.out = nn.LayerNorm(d_model), nn.Linear(d_model, 1)


def test_a_head_begins_with_the_values_that_every_layout_gives_by_name():
    model = ModelConfig.model_validate(MODEL | {"moe": None}).build(INPUTS, 0, {"held": Held(MODEL["d_model"])})
    held = model.heads["held"]
    assert held.scale == 1 and (held.norm.weight == 1).all() and (held.norm.bias == 0).all()
    assert torch.equal(held.out.weight, initial_value("heads.held.out.weight", held.out.weight.shape, 0, 0.02, 2))


def test_a_head_with_a_buffer_is_refused():
    head = Held(MODEL["d_model"])
    head.register_buffer("mean", torch.ones(3))
    with pytest.raises(ConfigError, match="the module of held has a buffer, mean, which a rank .* make it a parameter"):
        ModelConfig.model_validate(MODEL | {"moe": None}).build(INPUTS, 0, {"held": head})


class CoupledTerm(DistanceTerm):
    """As the one above, of which each micro-batch must know the others': a first pass sums their errors."""

    couples = True

    def embed(self, context: LossContext) -> torch.Tensor:
        assert context.planned
        return super().compute(context).total.detach()

    def prepass(self, embedded, part):
        return [sum(embedded)] * len(embedded)

    def compute(self, context: LossContext) -> TermSums | None:
        sums = super().compute(context)
        return sums and TermSums(sums.total * context.cached.double(), sums.items, sums.events)


@LOSS_TERMS.register("coupled")
class CoupledConfig(DistanceConfig):
    def build(self) -> LossTerm:
        return CoupledTerm(self.label, self.weight, self.scale)


def test_a_term_that_couples_micro_batches_has_its_pass_without_a_contrastive_loss():
    losses = {"contrastive": {"weight": 0.0}, "terms": [{"kind": "coupled"}]}
    two = one_process(Case(extension=__name__, losses=losses, micro=2, sequences=4))
    four = one_process(Case(extension=__name__, losses=losses, micro=1, sequences=4))
    assert two["terms"]["coupled"] == pytest.approx(four["terms"]["coupled"], rel=1e-11)
    assert not differences("gradients", two["gradients"], four["gradients"], 1e-11)
