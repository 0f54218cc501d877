"""Dealing the sequences of one global batch to data replicas, so that none waits long for another.

Sequences equal in positions are not equal in attention work. Contrastive groups are dealt whole, the costliest
first, in snake order: so the groups that replicas work on at the same time cost about the same, and so do their sums.
"""

import numpy as np

from mmoe.errors import ConfigError


def check_dealing(sequences: int, group: int, micro_sequences: int, replicas: int) -> None:
    """Raises ConfigError where a global batch cannot be dealt in whole groups and whole micro-batches."""
    if sequences % (group * replicas) or sequences % (micro_sequences * replicas):
        raise ConfigError(
            f"a global batch of {sequences} sequences cannot be dealt to {replicas} data replicas in contrastive "
            f"groups of {group} and micro-batches of {micro_sequences}; change training.global_batch_positions, "
            "training.micro_batch_sequences, losses.contrastive.group_sequences or the number of replicas"
        )


def deal(costs: np.ndarray, group: int, replicas: int) -> np.ndarray:
    """Which sequences each replica gets, in its order of work: [replicas, S / replicas] indices into `costs` [S].

    Consecutive `group` sequences stay together and in order. S must be a multiple of group x replicas.
    """
    order = np.argsort(-costs.reshape(-1, group).sum(axis=1), kind="stable")
    rounds = order.reshape(-1, replicas)
    rounds[1::2] = rounds[1::2, ::-1]
    return (rounds.T[:, :, None] * group + np.arange(group)).reshape(replicas, -1)
