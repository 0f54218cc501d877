"""Makes terms of the objective of the routers' losses, which the layers of experts work out."""

from mmoe.losses.term import LossContext, LossTerm, TermSums
from mmoe.schema.counts import Counts

_TITLES = {
    "balance_sequence": "load balance",
    "balance_micro_batch": "load balance, micro-batch",
    "balance_global_batch": "load balance, global batch",
    "router_z": "router z",
}


class RouterTerm(LossTerm):
    """Counts one of the routers' losses, a mean over a micro-batch's sequences, by its sequences."""

    itemized = by_modality = False

    def __init__(self, name: str, weight: float) -> None:
        super().__init__(name, weight)
        self.title = _TITLES[name]

    def denominator(self, counts: Counts, sequences: int) -> float:
        """Count the sequences."""
        return sequences

    def compute(self, context: LossContext) -> TermSums | None:
        """Weigh the mean by the sequences that it is of; None without experts."""
        if self.name not in context.router:
            return None
        sequences = context.batch.shape[0]
        return TermSums(context.router[self.name] * sequences, reports=context.part.reports_routing)
