"""The sum of all losses: independent of how a step is cut, and broken down without anything lost."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from mmoe.losses.action import ActionLossConfig
from mmoe.losses.config import LossConfig
from mmoe.losses.contrastive import ContrastiveConfig
from mmoe.losses.cross_entropy import CrossEntropyConfig, target_modality
from mmoe.losses.report import LossReport
from mmoe.models.decoder import ModelOutput, RouterAuxLosses
from mmoe.models.moe.balance import BalanceConfig, ExpertLoadAccumulator
from mmoe.schema.batch import IGNORE, PackedBatch, Pairs
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Vocabulary

B, L, D, H, A, E = 4, 12, 8, 2, 3, 5
VOCABULARY = Vocabulary(text_size=20, audio_codebooks=2, audio_codebook_size=4, action_bins=6)
CONFIG = LossConfig(
    ce=CrossEntropyConfig(text=1.0, audio=0.5, action=2.0, structure=0.25, chunk=5),
    contrastive=ContrastiveConfig(weight=0.3, group_sequences=1),
    action=ActionLossConfig(weight=0.7),
    load_balance=BalanceConfig(sequence=0.02),
    z_loss=0.004,
)


class Heads(nn.Module):
    """The smallest thing with a model's heads; float64, so that sums can be compared to the last digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(VOCABULARY.size, D)
        self.head = nn.Linear(D, VOCABULARY.size)
        self.act = nn.Linear(D, H * A)
        self.project = nn.Linear(D, E)
        self.double()

    def forward(self, batch: PackedBatch) -> ModelOutput:
        hidden = self.embed(batch.token_ids)
        # One number a sequence, averaged over the batch: what a router's losses are.
        each = hidden.square().mean((1, 2))
        load = torch.stack([batch.token_ids.flatten(), batch.labels.flatten().clamp(min=0)])
        auxiliary = RouterAuxLosses(
            balance_loss=each.mean(),
            z_loss=(each * 3).mean(),
            load_NE=F.one_hot(load % 3, 3).sum(1),
            probability_NE=torch.stack([hidden[..., :3], hidden[..., 3:6]]).softmax(-1).mean((1, 2)),
        )
        return ModelOutput(hidden, auxiliary, None)

    def logits(self, h: Tensor) -> Tensor:
        return self.head(h)

    def actions(self, h: Tensor) -> Tensor:
        return self.act(h).view(-1, H, A)

    def contrast(self, hidden: Tensor, pairs: Pairs, modality: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.flatten(0, 1)
        means = [[flat[a:b].mean(0) for a, b in pairs.span[:, side].tolist()] for side in (0, 1)]
        return tuple(self.project(torch.stack(side) if side else flat[:0]) for side in means)


def batch_of(rows: list[int], seed: int = 0) -> PackedBatch:
    """Sequences `rows` of one fixed global batch of B."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY.size, (B, L), generator=generator)
    labels = torch.randint(0, VOCABULARY.size, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < 0.3] = IGNORE
    source = torch.randint(0, 3, (B, L), generator=generator).short()
    kinds = target_modality(labels.clamp(min=0), VOCABULARY).long()
    weight = torch.from_numpy(CONFIG.ce.label_weights())[kinds] * (labels >= 0)
    target = torch.randn(B, H, A, generator=generator)
    mask = torch.rand(B, H, A, generator=generator) > 0.3
    # Two pairs in every sequence: sight against text, and text against audio.
    spans = torch.tensor([[[0, 3], [3, 5]], [[5, 7], [7, 10]]])
    sides = torch.tensor([[Modality.VISION, Modality.TEXT], [Modality.TEXT, Modality.AUDIO]], dtype=torch.uint8)
    texts = torch.randint(0, 3, (B, 2), generator=generator)
    n, at = len(rows), torch.arange(len(rows))
    return PackedBatch(
        token_ids=ids[rows],
        modality=torch.zeros(n, L, dtype=torch.uint8),
        document=torch.zeros(n, L, dtype=torch.int32),
        slice=torch.full((n, L), -1, dtype=torch.int32),
        position=torch.zeros(n, L, 3, dtype=torch.int32),
        camera=torch.full((n, L), -1, dtype=torch.int8),
        offset_ns=torch.zeros(n, L, dtype=torch.int64),
        source=source[rows],
        labels=labels[rows],
        loss_weight=weight[rows],
        values={},
        action_target=target[rows],
        action_mask=mask[rows],
        action_index=at * L + 4,
        pairs=Pairs(
            span=(spans[None] + at[:, None, None, None] * L).flatten(0, 1),
            modality=sides.repeat(n, 1),
            text_hash=texts[rows].flatten(),
            group=torch.tensor(rows).repeat_interleave(2),
        ),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32) * L,
        documents=[[(int(s), 0, 0, 0) for s in source[row].unique()] for row in rows],
    )


@dataclass
class Planned:
    """What the plan would have counted in the whole global batch."""

    labels: np.ndarray
    action_elements: int
    pairs: int

    @classmethod
    def without_targets(cls, batch: PackedBatch) -> "Planned":
        kinds = VOCABULARY.modality_of(batch.labels[batch.labels >= 0].numpy())
        labels = np.bincount(kinds, minlength=len(Modality))
        return cls(labels, int(batch.action_mask.sum()), len(batch.pairs.group))


@pytest.fixture
def model() -> Heads:
    return Heads()


WHOLE = batch_of([0, 1, 2, 3])
TERMS = CONFIG.build()
PLANNED = TERMS.denominators(Planned.without_targets(WHOLE), sequences=B)


def run(
    model: Heads,
    batch: PackedBatch,
    planned: dict[str, float] | None = None,
    config: LossConfig = CONFIG,
    loads: ExpertLoadAccumulator | None = None,
) -> LossReport:
    terms = config.build()
    planned = terms.denominators(Planned.without_targets(WHOLE), sequences=B) | (planned or {})
    return terms.compute(model, model(batch), batch, planned, VOCABULARY, loads or ExpertLoadAccumulator())


def gradients(model: Heads, total: Tensor) -> list[Tensor]:
    return torch.autograd.grad(total, list(model.parameters()))


def test_the_total_is_what_the_formula_says(model: Heads) -> None:
    report, output = run(model, WHOLE), model(WHOLE)
    logits = model.logits(output.hidden).flatten(0, 1)
    each = F.cross_entropy(logits, WHOLE.labels.flatten(), ignore_index=IGNORE, reduction="none")
    ce = (each * WHOLE.loss_weight.flatten()).sum() / WHOLE.loss_weight.double().sum()
    predicted = model.actions(output.hidden[:, 4])[WHOLE.action_mask]
    action = F.mse_loss(predicted, WHOLE.action_target[WHOLE.action_mask].double())
    terms = {"ce": ce, "action": action, "contrastive": report.terms["contrastive"]}
    terms |= {"balance_sequence": output.auxiliary.balance_loss, "router_z": output.auxiliary.z_loss}
    for name, value in terms.items():
        torch.testing.assert_close(report.terms[name], value.detach(), rtol=1e-6, atol=0)
    weights = {"ce": 1.0, "contrastive": 0.3, "action": 0.7, "balance_sequence": 0.02, "router_z": 0.004}
    expected = sum(weights[name] * float(value) for name, value in report.terms.items())
    assert report.loss.item() == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad for value in report.terms.values()) and report.loss_for_backward.requires_grad


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]], [[3, 1], [0, 2]]])
def test_any_cut_into_micro_batches_gives_the_same_step(model: Heads, cut: list[list[int]]) -> None:
    whole = run(model, WHOLE)
    parts = [run(model, batch_of(rows)) for rows in cut]
    report = sum((part.detach() for part in parts), LossReport.zero())
    assert report.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for name, value in whole.terms.items():
        assert float(report.terms[name]) == pytest.approx(float(value), rel=1e-12)
    for name, table in whole.items.items():
        torch.testing.assert_close(report.items[name], table, rtol=1e-12, atol=1e-12)
    assert {k: v.tolist() for k, v in report.events.items()} == {k: v.tolist() for k, v in whole.events.items()}
    summed = [sum(parts) for parts in zip(*(gradients(model, part.loss_for_backward) for part in parts), strict=True)]
    for got, wanted in zip(summed, gradients(model, whole.loss_for_backward), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def test_each_level_of_balance_counts_by_its_own_coefficient(model: Heads) -> None:
    """Two micro-batches: the second's global level knows the loads of both."""
    levels = BalanceConfig(sequence=0.0, micro_batch=0.5, global_batch=0.25)
    config = CONFIG.model_copy(update={"load_balance": levels, "z_loss": 0.0})
    parts, loads, load = [batch_of([0]), batch_of([1, 2, 3])], ExpertLoadAccumulator(), torch.zeros(2, 3)
    for batch in parts:
        report, auxiliary = run(model, batch, config=config, loads=loads), model(batch).auxiliary
        assert "balance_sequence" not in report.terms
        load = load + auxiliary.load_NE
        for name, counted in (("balance_micro_batch", auxiliary.load_NE), ("balance_global_batch", load)):
            level = sum(
                3 * float(counted[n, e] / counted[n].sum() * auxiliary.probability_NE[n, e].detach())
                for n in range(2)
                for e in range(3)
            )
            assert float(report.terms[name]) == pytest.approx(level / 2 * batch.shape[0] / B, rel=1e-6)
        weights = {"ce": 1.0, "contrastive": 0.3, "action": 0.7, "router_z": 0.0}
        weights |= {"balance_micro_batch": 0.5, "balance_global_batch": 0.25}
        assert report.loss.item() == pytest.approx(sum(weights[n] * float(v) for n, v in report.terms.items()))
    assert torch.equal(loads.total(), load.long())


def test_the_breakdown_is_complete_and_by_the_target(model: Heads) -> None:
    report, output = run(model, WHOLE), model(WHOLE)
    logits = model.logits(output.hidden).flatten(0, 1).detach()
    each = F.cross_entropy(logits, WHOLE.labels.flatten(), ignore_index=IGNORE, reduction="none")
    kinds = VOCABULARY.modality_of(WHOLE.labels.clamp(min=0).flatten().numpy())
    valid = (WHOLE.labels >= 0).flatten()
    by_modality, by_source = report.by_modality("ce"), report.by_source("ce")
    assert set(by_modality) == {Modality.STRUCTURE, Modality.TEXT, Modality.AUDIO, Modality.ACTION}
    for kind, mean in by_modality.items():
        assert mean == pytest.approx(float(each[valid & torch.from_numpy(kinds == kind)].mean()), rel=1e-9)
    for number, mean in by_source.items():
        assert mean == pytest.approx(float(each[valid & (WHOLE.source.flatten() == number)].mean()), rel=1e-9)
    assert float(report.items["ce"][..., 1].sum()) == int(valid.sum())
    assert float(report.items["action"][..., 1].sum()) == int(WHOLE.action_mask.sum())
    assert set(report.by_modality("contrastive")) == {Modality.VISION, Modality.AUDIO}
    assert float(report.items["contrastive"][..., 1].sum()) == 2 * B


def test_details_are_flat_numbers_with_source_names(model: Heads) -> None:
    details = TERMS.figures(run(model, WHOLE), ["drive", "books", "speech"])
    assert {"ce_text", "ce_audio", "ce_action", "ce_structure", "ce_from_drive", "ce_from_books"} <= set(details)
    assert {"contrastive_vision", "contrastive_audio", "action_from_speech"} & set(details)
    assert 0 <= details["contrastive_accuracy"] <= 1
    assert details["contrastive_pairs"] == 2 * B
    assert all(isinstance(value, float) for value in details.values())
    assert TERMS.figures(LossReport.zero(), []) == {}


def test_a_lost_item_contributes_zero_and_stays_in_the_denominator(model: Heads) -> None:
    """A quarantined sequence: no labels, no action, no pairs; the others' share of the step does not change."""
    kept = batch_of([0, 1, 2])
    empty = replace(
        batch_of([3]),
        labels=torch.full((1, L), IGNORE),
        action_mask=torch.zeros(1, H, A, dtype=torch.bool),
        pairs=Pairs(*(getattr(WHOLE.pairs, name)[:0] for name in ("span", "modality", "text_hash", "group"))),
        documents=[[]],
        source=torch.full((1, L), -1, dtype=torch.int16),
    )
    report = run(model, kept) + run(model, empty)
    assert float(report.terms["ce"]) == pytest.approx(float(run(model, kept).terms["ce"]), rel=1e-12)
    assert float(report.items["ce"][..., 1].sum()) < float(run(model, WHOLE).items["ce"][..., 1].sum())


def test_a_dense_model_has_no_router_terms(model: Heads) -> None:
    output = model(WHOLE)
    output = replace(output, auxiliary=None)
    report = TERMS.compute(model, output, WHOLE, PLANNED, VOCABULARY, ExpertLoadAccumulator())
    assert set(report.terms) == {"ce", "contrastive", "action"}


def test_items_the_plan_did_not_count_are_refused(model: Heads) -> None:
    with pytest.raises(ValueError, match="counted nothing of the loss term contrastive"):
        run(model, WHOLE, {"contrastive": 0})
    with pytest.raises(ValueError, match="counted nothing of the loss term ce"):
        run(model, WHOLE, {"ce": 0.0})


def test_label_weights_follow_the_modality_of_the_target() -> None:
    weights = CONFIG.ce.label_weights()
    named = {kind.name: float(weights[kind]) for kind in Modality}
    zero = dict.fromkeys(("VISION", "INERTIAL", "STATE"), 0)
    assert named == {"STRUCTURE": 0.25, "TEXT": 1.0, "AUDIO": 0.5, "ACTION": 2.0} | zero
    assert PLANNED["ce"] == pytest.approx(float(WHOLE.loss_weight.double().sum()))


@pytest.mark.parametrize(
    "wrong", [{"load_balance": {"sequence": -1.0}}, {"load_balance": 0.01}, {"tau": 0.1}, {"contrastive": {"tau": 0.0}}]
)
def test_impossible_configs_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        LossConfig.model_validate(wrong)
