"""The training objective: every term a sum over items divided by what the plan counted for the step.

``total = CE + contrastive.weight * InfoNCE + action.weight * L2 + sum_level balance.level * B_level + router_z * z``

Adding the totals of a step's micro-batches gives the step's loss, however the step is cut (design.md, "Loss
scaling"): no micro-batch divides by its own count.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.losses.action import squared_error
from mmoe.losses.cached import CachedInfoNCE
from mmoe.losses.contrastive import info_nce
from mmoe.losses.cross_entropy import cross_entropy
from mmoe.losses.part import WHOLE, Part, share
from mmoe.models.moe.balance import BalanceConfig, StepLoads
from mmoe.schema.batch import PackedBatch
from mmoe.schema.sample import Modality
from mmoe.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mmoe.models.decoder import ModelOutput, MultimodalModel
    from mmoe.schema.counts import Counts

KINDS = len(Modality)


class CrossEntropyConfig(Config):
    """Weight of a label by the modality of its target; discrete actions are ACTION labels."""

    text: float = Field(default=1.0, ge=0)
    audio: float = Field(default=1.0, ge=0)
    action: float = Field(default=1.0, ge=0)
    structure: float = Field(default=1.0, ge=0)
    # Labelled positions whose logits exist at the same time.
    chunk: Annotated[int, Nature.LAYOUT] = Field(default=1024, gt=0)


class ContrastiveConfig(Config):
    """Configures InfoNCE between the two sides of contrastive pairs."""

    weight: float = Field(default=0.1, ge=0)
    tau: float = Field(default=0.07, gt=0)
    group_sequences: int | None = Field(default=None, gt=0)  # sequences that share negatives; null: the global batch


class ActionLossConfig(Config):
    """Configures the squared error of continuous actions."""

    weight: float = Field(default=1.0, ge=0)


class LossConfig(Config):
    """Holds the weights and settings of all loss terms."""

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
    """Losses of a micro-batch; reports of the same step, from all processes, add up to the report of the step.

    `objective` is the scalar to differentiate, `total` its detached share of the step's loss: they differ where
    several processes work out a term together (`Part`). `terms` are the parts of `total` (``ce contrastive action
    router_z``, and ``balance_sequence balance_micro_batch balance_global_batch`` where their coefficients are not 0)
    before their weights: item sums over planned counts, detached. `items` keeps for the first three [sources,
    modalities, 2] f64: sum and number of the items present, unweighted (CE in nats, by the modality of the target;
    InfoNCE, by that of the side that is not text; squared errors). `events` counts `pairs`, those `compared` (they have
    a negative), the `correct` among them (mean of both directions), and `same_text` (ordered pairs of pairs that
    were not compared).
    """

    objective: Tensor
    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    items: dict[str, Tensor] = field(default_factory=dict)
    events: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zero(cls) -> LossReport:
        """The report of nothing: the start of a sum."""
        return cls(torch.zeros(()), torch.zeros(()))

    def __add__(self, other: LossReport) -> LossReport:
        return LossReport(
            self.objective + other.objective,
            self.total + other.total,
            _merge(self.terms, other.terms),
            _merge(self.items, other.items),
            _merge(self.events, other.events),
        )

    def detach(self) -> LossReport:
        """Give the report without the graph behind its objective."""
        return replace(self, objective=self.objective.detach())

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
    part: Part = WHOLE,
    cached: CachedInfoNCE | None = None,
) -> LossReport:
    """Every term of one micro-batch, given the model's `output` on it and the step's planned `counts`.

    `output.hidden` is of the whole batch, of whose losses this process works out `part`. `loads`
    are those of the step before this micro-batch; its own are added. `cached` are the contrastive losses of its pairs
    where their groups are wider (`mmoe.losses.cached`).

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

    head = part.head or model.logits
    ce = cross_entropy(head, output.hidden, batch.labels, batch.loss_weight, config.ce.chunk, part)
    kinds = target_modality(batch.labels.flatten()[ce.index_N], vocabulary)
    items["ce"] = tabulate(ce.items_N, torch.ones_like(ce.items_N), ce.index_N, kinds) * part.reports_labels
    terms = {"ce": _share(ce.total, counts.labels, "labels")}
    reported = {"ce": part.reports_labels}

    pairs = part.own_pairs(batch.pairs)
    # By the plan, not by what is here: every rank must use the heads that any rank uses, be it on nothing.
    if counts.pairs or len(pairs.group):
        left, right = model.contrast(output.hidden, pairs, batch.modality)
        nce = cached(left, right) if cached else info_nce(left, right, pairs, config.contrastive.tau, part.gather_pairs)
        compared = nce.negatives_P > 0
        first, second = pairs.modality.unbind(1)
        other_side = torch.where(first == Modality.TEXT, second, first)
        start = pairs.span[:, 0, 0]
        items["contrastive"] = tabulate(nce.items_P, torch.ones_like(nce.items_P), start, other_side)
        events = {
            "pairs": torch.full_like(nce.masked, len(compared)),
            "compared": compared.sum(),
            "correct": (nce.correct_P2 & compared[:, None]).double().sum() / 2,
            "same_text": nce.masked,
        }
        terms["contrastive"] = _share(nce.items_P.sum(), counts.pairs, "contrastive pairs")

    if counts.action_elements or len(batch.action_index):
        columns = batch.action_index, batch.action_target, batch.action_mask
        index, target, mask = (share(column, part.items) for column in columns)
        errors = squared_error(model.actions(output.hidden.flatten(0, 1)[index]), target, mask)
        kinds = torch.full_like(index, Modality.ACTION)
        items["action"] = tabulate(errors, mask.sum((1, 2)), index, kinds)
        terms["action"] = _share(errors.sum(), counts.action_elements, "action elements")

    if output.auxiliary is not None:
        # Means over this micro-batch's sequences: weighted by their share of the step's.
        weight = batch.shape[0] / counts.sequences
        routing = output.auxiliary.terms(loads, config.balance)
        terms |= {name: term * weight for name, term in routing.items()}
        reported |= dict.fromkeys(routing, part.reports_routing)

    weights = {
        "ce": 1.0,
        "contrastive": config.contrastive.weight,
        "action": config.action.weight,
        **{f"balance_{level}": weight for level, weight in config.balance},
        "router_z": config.router_z,
    }
    objective = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
    shares = {name: term.detach() * reported.get(name, True) for name, term in terms.items()}
    total = sum((weights[name] * term for name, term in shares.items()), torch.zeros_like(objective.detach()))
    return LossReport(objective, total, shares, items, events)


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
