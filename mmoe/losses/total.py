"""The training objective: every term a sum over items divided by what the plan counted for the step.

``total = CE + contrastive.weight * InfoNCE + action.weight * L2 + sum_level balance.level * B_level + router_z * z``

Adding the totals of a step's micro-batches gives the step's loss, however the step is cut (design.md, "Loss
scaling"): no micro-batch divides by its own count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmoe.config.base import Config
from mmoe.data.batch import PackedBatch
from mmoe.data.sample import Modality
from mmoe.losses.action import squared_error
from mmoe.losses.contrastive import info_nce
from mmoe.losses.cross_entropy import cross_entropy
from mmoe.models.moe.balance import BalanceConfig, StepLoads, balance_loss
from mmoe.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mmoe.data.plan import Counts
    from mmoe.models.decoder import Auxiliary, ModelOutput, MultimodalModel

KINDS = len(Modality)


class CrossEntropyConfig(Config):
    """Weight of a label by the modality of its target; discrete actions are ACTION labels."""

    text: float = Field(default=1.0, ge=0)
    audio: float = Field(default=1.0, ge=0)
    action: float = Field(default=1.0, ge=0)
    structure: float = Field(default=1.0, ge=0)
    chunk: int = Field(default=1024, gt=0)  # labelled positions whose logits exist at the same time


class ContrastiveConfig(Config):
    weight: float = Field(default=0.1, ge=0)
    tau: float = Field(default=0.07, gt=0)
    group_sequences: int | None = Field(default=None, gt=0)  # sequences that share negatives; null: the global batch


class ActionLossConfig(Config):
    weight: float = Field(default=1.0, ge=0)


class LossConfig(Config):
    ce: CrossEntropyConfig = CrossEntropyConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    action: ActionLossConfig = ActionLossConfig()
    balance: BalanceConfig = BalanceConfig()
    router_z: float = Field(default=0.001, ge=0)  # of the routers' z-loss

    def label_weights(self) -> np.ndarray:
        """[modalities] f32: the `loss_weight` of a label by the modality of its target."""
        weights = np.zeros(KINDS, np.float32)
        for kind in (Modality.TEXT, Modality.AUDIO, Modality.ACTION, Modality.STRUCTURE):
            weights[kind] = getattr(self.ce, kind.name.lower())
        return weights


@dataclass(frozen=True)
class PlannedCounts:
    """The denominators of one optimizer step; `labels` is the sum of the labels' loss weights."""

    labels: float
    action_elements: int
    pairs: int
    sequences: int

    @classmethod
    def of(cls, counts: Counts, config: LossConfig, sequences: int) -> PlannedCounts:
        """Those of a step whose plan counted `counts` in `sequences` sequences."""
        labels = float(counts.labels @ config.label_weights().astype(np.float64))
        return cls(labels, counts.action_elements, counts.pairs, sequences)


@dataclass(frozen=True)
class LossReport:
    """Losses of a micro-batch; reports of the same step add up to the report of the step.

    `total` is the scalar to differentiate. `terms` are its parts (``ce contrastive action router_z``, and
    ``balance_sequence balance_micro_batch balance_global_batch`` where their coefficients are not 0) before their
    weights: item sums over planned counts, detached. `items` keeps for the first three [sources, modalities, 2]
    f64: sum and number of the items present, unweighted (CE in nats, by the modality of the target; InfoNCE, by
    that of the side that is not text; squared errors). `events` counts `pairs`, those `compared` (they have a
    negative), the `correct` among them (mean of both directions), and `same_text` (ordered pairs of pairs that
    were not compared).
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    items: dict[str, Tensor] = field(default_factory=dict)
    events: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zero(cls) -> LossReport:
        """The report of nothing: the start of a sum."""
        return cls(torch.zeros(()))

    def __add__(self, other: LossReport) -> LossReport:
        return LossReport(
            self.total + other.total,
            _merge(self.terms, other.terms),
            _merge(self.items, other.items),
            _merge(self.events, other.events),
        )

    def detach(self) -> LossReport:
        return LossReport(self.total.detach(), self.terms, self.items, self.events)

    def by_modality(self, term: str) -> dict[Modality, float]:
        """Mean over the items present of ``ce``, ``contrastive`` or ``action``, where there are any."""
        means = _means(self.items[term].sum(0)) if term in self.items else {}
        return {Modality(kind): mean for kind, mean in means.items()}

    def by_source(self, term: str) -> dict[int, float]:
        """As `by_modality`, by the number of the source."""
        return _means(self.items[term].sum(1)) if term in self.items else {}

    def details(self, sources: list[str]) -> dict[str, float]:
        """The breakdown as flat scalars: ``ce_text``, ``ce_from_<source>``, ``contrastive_accuracy``, ..."""
        record: dict[str, float] = {}
        for term in self.items:
            if term != "action":  # its items are all of one modality
                record |= {f"{term}_{kind.name.lower()}": mean for kind, mean in self.by_modality(term).items()}
            record |= {f"{term}_from_{sources[number]}": mean for number, mean in self.by_source(term).items()}
        events = {name: float(count) for name, count in self.events.items()}
        if events:
            if events["compared"]:
                record["contrastive_accuracy"] = events["correct"] / events["compared"]
            record["contrastive_pairs"] = events["pairs"]
            record["contrastive_without_negative"] = events["pairs"] - events["compared"]
            record["contrastive_same_text"] = events["same_text"]
        return record


def compute(
    model: MultimodalModel,
    output: ModelOutput,
    batch: PackedBatch,
    counts: PlannedCounts,
    config: LossConfig,
    vocabulary: Vocabulary,
    loads: StepLoads,
) -> LossReport:
    """Every term of one micro-batch, given the model's `output` on it and the step's planned `counts`.

    `loads` are those of the step before this micro-batch; its own are added.

    Raises ValueError when the batch holds items of a kind of which the plan counted none.
    """
    items: dict[str, Tensor] = {}
    events: dict[str, Tensor] = {}
    sources = 1 + max((document[0] for documents in batch.documents for document in documents), default=-1)
    source = batch.source.flatten()

    def tabulate(values: Tensor, numbers: Tensor, at: Tensor, kinds: Tensor) -> Tensor:
        rows = torch.stack([values.detach().double(), numbers.double()], dim=1)
        table = rows.new_zeros(sources * KINDS, 2)
        return table.index_add_(0, source[at].long() * KINDS + kinds.long(), rows).view(sources, KINDS, 2)

    ce = cross_entropy(model.logits, output.hidden, batch.labels, batch.loss_weight, config.ce.chunk)
    kinds = target_modality(batch.labels.flatten()[ce.index_N], vocabulary)
    items["ce"] = tabulate(ce.items_N, torch.ones_like(ce.items_N), ce.index_N, kinds)
    terms = {"ce": _share(ce.total, counts.labels, "labels")}

    if len(batch.pairs.group):
        left, right = model.contrast(output.hidden, batch.pairs, batch.modality)
        nce = info_nce(left, right, batch.pairs, config.contrastive.tau)
        compared = nce.negatives_P > 0
        first, second = batch.pairs.modality.unbind(1)
        other_side = torch.where(first == Modality.TEXT, second, first)
        start = batch.pairs.span[:, 0, 0]
        items["contrastive"] = tabulate(nce.items_P, torch.ones_like(nce.items_P), start, other_side)
        events = {
            "pairs": torch.full_like(nce.masked, len(compared)),
            "compared": compared.sum(),
            "correct": nce.correct_P2[compared].double().sum() / 2,
            "same_text": nce.masked,
        }
        terms["contrastive"] = _share(nce.items_P.sum(), counts.pairs, "contrastive pairs")

    if len(batch.action_index):
        predicted = model.actions(output.hidden.flatten(0, 1)[batch.action_index])
        errors = squared_error(predicted, batch.action_target, batch.action_mask)
        kinds = torch.full_like(batch.action_index, Modality.ACTION)
        items["action"] = tabulate(errors, batch.action_mask.sum((1, 2)), batch.action_index, kinds)
        terms["action"] = _share(errors.sum(), counts.action_elements, "action elements")

    if output.auxiliary is not None:
        # Means over this micro-batch's sequences: weighted by their share of the step's.
        share = batch.shape[0] / counts.sequences
        loads.add(output.auxiliary.load_NE)
        terms |= {name: term * share for name, term in _balance_terms(output.auxiliary, loads, config.balance)}
        terms["router_z"] = output.auxiliary.z_loss * share

    weights = {
        "ce": 1.0,
        "contrastive": config.contrastive.weight,
        "action": config.action.weight,
        **{f"balance_{level}": weight for level, weight in config.balance},
        "router_z": config.router_z,
    }
    total = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
    return LossReport(total, {name: term.detach() for name, term in terms.items()}, items, events)


def _balance_terms(auxiliary: Auxiliary, loads: StepLoads, config: BalanceConfig) -> Iterator[tuple[str, Tensor]]:
    """The load-balancing loss at each level that counts, a mean over the layers of experts."""
    if config.sequence:
        yield "balance_sequence", auxiliary.balance_loss
    if config.micro_batch:
        yield "balance_micro_batch", balance_loss(auxiliary.load_NE, auxiliary.probability_NE).mean()
    if config.global_batch:
        yield "balance_global_batch", balance_loss(loads.total(), auxiliary.probability_NE).mean()


def target_modality(labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Modality (u8) of the tokens to be predicted: `Vocabulary.modality_of` where the labels are."""
    return torch.from_numpy(vocabulary.modality_of(labels.cpu().numpy())).to(labels.device)


def _share(total: Tensor, planned: float, what: str) -> Tensor:
    if planned > 0:
        return total / planned
    if total.detach() != 0:
        raise ValueError(f"the plan of this step counted no {what}, but the batch holds some")
    return total


def _merge(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(a)
    for name, value in b.items():
        merged[name] = _add(merged[name], value) if name in merged else value
    return merged


def _add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; the table with fewer sources counts zero for the rest."""
    if a.ndim and len(a) != len(b):
        a, b = (a, b) if len(a) > len(b) else (b, a)
        b = torch.cat([b, b.new_zeros(len(a) - len(b), *b.shape[1:])])
    return a + b


def _means(table: Tensor) -> dict[int, float]:
    return {row: total / number for row, (total, number) in enumerate(table.tolist()) if number}
