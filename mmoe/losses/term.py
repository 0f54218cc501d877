"""Defines a term of the training loss, and how one from outside the package is registered.

Shape suffixes: B sequences, L positions, D model width, n items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn

from mmoe.config.registry import KindConfig, Registry
from mmoe.losses.loss_share import LossShare, take_share
from mmoe.schema.batch import PackedBatch
from mmoe.schema.counts import Counts
from mmoe.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mmoe.models.decoder import MultimodalModel
    from mmoe.models.embeddings import ModelInputs


@dataclass(frozen=True)
class LossContext:
    """Gives a term what one micro-batch is.

    `hidden_BLD` is the backbone's output on the whole `batch`, of whose items this process computes `part`.
    `router` holds the routers' losses by name, means over the batch's sequences and the layers of experts (empty
    without experts). `planned` is the term's denominator in this step, `cached` what its `prepass` gave for this
    micro-batch (None without one).
    """

    model: MultimodalModel
    hidden_BLD: Tensor
    batch: PackedBatch
    vocabulary: Vocabulary
    planned: float
    part: LossShare
    router: Mapping[str, Tensor]
    cached: Any = None

    def share(self, rows: Tensor) -> Tensor:
        """Choose the rows (items of a batch) that this process computes; every item is one process's."""
        return take_share(rows, self.part.items)


@dataclass(frozen=True)
class Items:
    """Holds the losses of n items one by one, detached: what a term is broken down into.

    `values_n` are unweighted; `numbers_n` says how many elements each value is the sum of; `position_n` is the item's
    flat position (of B*L), which says its source; `modality_n` is the modality that it is reported under.
    """

    values_n: Tensor
    numbers_n: Tensor
    position_n: Tensor
    modality_n: Tensor


@dataclass(frozen=True)
class TermSums:
    """Holds a term's share of a micro-batch on this process, before weight and denominator.

    `total` is a scalar with gradient, the sum over the items here; it passes through the term's head also where there
    is no item, because every rank must use the parameters that any rank uses. `events` counts what `event_names` of
    the term name. Where several processes compute the same value, one alone `reports` it.
    """

    total: Tensor
    items: Items | None = None
    events: Mapping[str, Tensor] = field(default_factory=dict)
    reports: bool = True


class LossTerm:
    """Computes a term of the training loss: a sum over items, divided by what the plan counted of them for the step.

    Subclasses say what they count and compute. `name` is the term's name in records; so is that of its head's
    parameters, ``heads.<name>``.
    """

    title: str = ""  # what pages call it; empty: its name
    event_names: tuple[str, ...] = ()  # what it counts beside its items
    itemized: bool = True  # its items are reported by source
    by_modality: bool = True  # and by modality
    couples: bool = False  # items of different micro-batches of a contrastive group depend on one another

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name, self.weight = name, weight

    def head(self, inputs: ModelInputs, d_model: int) -> nn.Module | None:
        """Build the term's own module, which becomes ``model.heads[name]``; None where it needs none.

        Its parameters get the values of `mmoe.models.init` by their names, equal in every layout; it has no buffers.
        """
        return None

    def denominator(self, counts: Counts, sequences: int) -> float:
        """Count the items of a step of so many sequences by what is planned of it; 0 where it has none."""
        raise NotImplementedError

    def compute(self, context: LossContext) -> TermSums | None:
        """Compute the term of one micro-batch.

        None says that the step has nothing of it, which every rank must say alike (by `planned`).
        """
        raise NotImplementedError

    def embed(self, context: LossContext) -> Any:
        """Keep of a micro-batch what `prepass` needs, without gradient; asked where the term `couples`."""
        raise NotImplementedError

    def prepass(self, embedded: Sequence[Any], part: LossShare) -> list[Any]:
        """Turn what `embed` kept of each micro-batch of the step into what `compute` finds as `cached` (GradCache)."""
        raise NotImplementedError

    def figures(self, events: Mapping[str, float]) -> dict[str, float]:
        """Give the scalars that the step's events are recorded as, without the term's name before them."""
        return dict(events)


class LossTermConfig(KindConfig):
    """Configures a term of the loss that `losses.terms` names by its kind; a subclass declares its keys."""

    name: str = Field(
        default="", pattern=r"^([a-z][a-z0-9_]*)?$"
    )  # of the term in records and parameters; empty: the kind
    weight: float = Field(default=1.0, ge=0)  # of the term in the loss

    def build(self) -> LossTerm:
        """Build the term, named `label`."""
        raise NotImplementedError


LOSS_TERMS = Registry[LossTermConfig]("loss term", "mmoe.losses", LossTermConfig, {})
"""The kinds of further terms; those of every run have keys of their own in `LossConfig`."""
