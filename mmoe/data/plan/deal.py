"""Dealing the sequences of one global batch to data replicas, so that none waits long for another.

Sequences equal in positions are not equal in attention work. They are dealt in rounds, the costliest first, and in each
round the costliest goes to the replica with the least work so far (of two rounds: a snake). So what replicas work on at
the same time costs about the same, and so do their sums. Micro-step k is the k-th micro-batch of every replica; `Reach`
says how much of this order a contrastive group decides.
"""

from enum import Enum

import numpy as np

from mmoe.errors import ConfigError

MOST_SEQUENCES = 1 << 20  # of a global batch: all are planned before the first is decoded


class Reach(Enum):
    """Where all sequences of a contrastive group are."""

    MICRO_BATCH = "micro_batch"  # of one replica: it is dealt whole
    MICRO_STEP = "micro_step"  # of all replicas: its embeddings are gathered within the forward pass
    STEP = "step"  # it is wider than any forward pass: its embeddings are cached in a pass of their own

    @classmethod
    def of(cls, group: int, micro_sequences: int, replicas: int) -> "Reach":
        """The narrowest that groups of so many sequences fill without a rest."""
        if micro_sequences % group == 0:
            return cls.MICRO_BATCH
        return cls.MICRO_STEP if micro_sequences * replicas % group == 0 else cls.STEP


def check_dealing(sequences: int, group: int, micro_sequences: int, replicas: int) -> None:
    """Raises ConfigError where a global batch is not made of whole contrastive groups and whole micro-steps, and for
    one of more sequences than a step can plan."""
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


def deal(costs: np.ndarray, group: int, micro_sequences: int, replicas: int) -> np.ndarray:
    """Which sequences each replica gets, in its order of work: [replicas, S / replicas] indices into `costs` [S].

    A contrastive group is `group` consecutive sequences. One that fits a micro-batch stays together and in order, one
    that fits a micro-step stays in it. S must be a multiple of group and of micro_sequences x replicas.
    """
    reach = Reach.of(group, micro_sequences, replicas)
    unit = group if reach is Reach.MICRO_BATCH else 1  # sequences that are dealt as one
    spans = np.arange(len(costs)).reshape(1, -1, unit)  # units among which the costliest come first
    if reach is Reach.MICRO_STEP:
        spans = _costliest_first(spans.reshape(-1, group), costs).reshape(-1, micro_sequences * replicas, 1)
    total = np.zeros(replicas, costs.dtype)
    rounds = []
    for units in spans:
        work = np.zeros(replicas, costs.dtype)  # within this span, where replicas wait for one another
        for taken in _costliest_first(units, costs).reshape(-1, replicas, unit):
            dealt = np.empty_like(taken)
            dealt[np.lexsort((total, work))] = taken
            rounds.append(dealt)
            work += costs[dealt].sum(axis=1)
            total += costs[dealt].sum(axis=1)
    return np.concatenate(rounds, axis=1)


def _costliest_first(units: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Rows of sequences by falling sum of their costs."""
    return units[np.argsort(-costs[units].sum(axis=1), kind="stable")]
