"""Deal the sequences of one global batch to data replicas, so that none waits long for another.

Sequences equal in positions are not equal in work: attention grows with the squares of their documents, the vision
encoder with their patches, and a replica that has the most of either is waited for. Each kind is measured by what a
replica has of it on average, and the larger of the two is the cost of a sequence, or of all that a replica has so far:
the greedy rule of vector scheduling (Chekuri and Khanna 2004), with one kind the longest processing time first (Graham
1969). Sequences are dealt in rounds of one a replica, the costliest first, and each goes to the replica of the round
which it leaves at the least cost (of one kind and two rounds: a snake). So what replicas work on at the same time costs
about the same, and so do their sums. Micro-step k is the k-th micro-batch of every replica; `ContrastiveScope` says how
much of this order a contrastive group decides.
"""

from enum import Enum

import numpy as np

from mmoe.errors import ConfigError

MOST_SEQUENCES = 1 << 20  # of a global batch: all are planned before the first is decoded


class ContrastiveScope(Enum):
    """Says within what all sequences of a contrastive group are."""

    MICRO_BATCH = "micro_batch"  # of one replica: it is dealt whole
    MICRO_STEP = "micro_step"  # of all replicas: its embeddings are gathered within the forward pass
    STEP = "step"  # it is wider than any forward pass: its embeddings are cached in a pass of their own

    @classmethod
    def narrowest(cls, group: int, micro_sequences: int, replicas: int) -> "ContrastiveScope":
        """Return the narrowest scope that groups of so many sequences fill without a rest."""
        if micro_sequences % group == 0:
            return cls.MICRO_BATCH
        return cls.MICRO_STEP if micro_sequences * replicas % group == 0 else cls.STEP


def check_dealing(sequences: int, group: int, micro_sequences: int, replicas: int) -> None:
    """Raise ConfigError where a global batch is not made of whole contrastive groups and whole micro-steps.

    It is raised, too, for a batch of more sequences than a step can plan.
    """
    if sequences > MOST_SEQUENCES:
        raise ConfigError(
            f"training.global_batch_positions makes {sequences:,} sequences a step, more than the {MOST_SEQUENCES:,} "
            "that a step plans; lower it or raise data.sequence_length"
        )
    if sequences % group or sequences % (micro_sequences * replicas):
        raise ConfigError(
            f"a global batch of {sequences} sequences cannot be dealt to {replicas} data replicas in micro-batches of "
            f"{micro_sequences} and contrastive groups of {group}: it must be a multiple of both "
            f"{micro_sequences} x {replicas} and {group}; change training.global_batch_positions, "
            "training.micro_batch_sequences, losses.contrastive.group_sequences or the number of replicas"
        )


def assign_to_replicas(costs: np.ndarray, group: int, micro_sequences: int, replicas: int) -> np.ndarray:
    """Deal sequences to replicas by greedy balancing: in each round the costliest goes to the least loaded one.

    Returns [replicas, S / replicas] indices into `costs`, each replica's in its order of work. `costs` [S, C] are of C
    kinds of work; one replica alone goes by the first. A contrastive group is `group` consecutive sequences. One that
    fits a micro-batch stays together and in order, one that fits a micro-step stays in it. S must be a multiple of
    group and of micro_sequences x replicas.
    """
    if replicas == 1:
        costs = costs[:, :1]
    average = np.maximum(costs.sum(axis=0) / replicas, np.finfo(float).tiny)
    scope = ContrastiveScope.narrowest(group, micro_sequences, replicas)
    unit = group if scope is ContrastiveScope.MICRO_BATCH else 1  # sequences that are dealt as one
    spans = np.arange(len(costs)).reshape(1, -1, unit)  # units among which the costliest come first
    if scope is ContrastiveScope.MICRO_STEP:
        spans = _costliest_first(spans.reshape(-1, group), costs, average)
        spans = spans.reshape(-1, micro_sequences * replicas, 1)
    total = np.zeros((replicas, costs.shape[1]), costs.dtype)
    rounds = []
    for units in spans:
        work = np.zeros_like(total)  # within this span, where replicas wait for one another
        for taken in _costliest_first(units, costs, average).reshape(-1, replicas, unit):
            dealt = np.empty_like(taken)
            free = np.arange(replicas)
            before = (total / average).max(axis=1)
            for sequences in taken:
                after = ((work[free] + costs[sequences].sum(axis=0)) / average).max(axis=1)
                chosen = np.lexsort((before[free], after))[0]
                dealt[free[chosen]] = sequences
                free = np.delete(free, chosen)
            rounds.append(dealt)
            work += costs[dealt].sum(axis=1)
            total += costs[dealt].sum(axis=1)
    return np.concatenate(rounds, axis=1)


def balance(costs: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Return the work of the replica that has most of it over the mean, [C], one number a kind; 1 where there is none.

    `costs` [S, C] is the work of each sequence by kind, `dealt` is what `assign_to_replicas` gives.
    """
    work = costs[dealt].sum(axis=1)
    mean = work.mean(axis=0)
    return np.where(mean > 0, work.max(axis=0) / np.where(mean > 0, mean, 1), 1.0)


def _costliest_first(units: np.ndarray, costs: np.ndarray, average: np.ndarray) -> np.ndarray:
    """Rows of sequences by falling cost of their sums."""
    return units[np.argsort(-(costs[units].sum(axis=1) / average).max(axis=1), kind="stable")]
