"""Dealing the sequences of one global batch to data replicas, so that none waits long for another.

Sequences equal in positions are not equal in attention work. Contrastive groups are dealt whole, the costliest
first, in snake order: so the groups that replicas work on at the same time cost about the same, and so do their sums.
"""

import numpy as np


def deal(costs: np.ndarray, group: int, replicas: int) -> np.ndarray:
    """Which sequences each replica gets, in its order of work: [replicas, S / replicas] indices into `costs` [S].

    Consecutive `group` sequences stay together and in order. S must be a multiple of group x replicas.
    """
    order = np.argsort(-costs.reshape(-1, group).sum(axis=1), kind="stable")
    rounds = order.reshape(-1, replicas)
    rounds[1::2] = rounds[1::2, ::-1]
    return (rounds.T[:, :, None] * group + np.arange(group)).reshape(replicas, -1)
