"""Decides what becomes of a step: the strongest wish of any callback on any rank, taken by all ranks."""

from enum import IntEnum

from mmoe.runtime.launch import strongest


class Decision(IntEnum):
    """Says what becomes of a step whose gradients are known, from the weakest wish to the strongest.

    ``GO`` takes the step. ``SKIP`` counts it and goes on behind its data, but changes no weight and no optimizer state:
    Adam's own step count stays, the learning rate follows the run's step. ``ROLL_BACK`` drops the step and goes back to
    the newest whole checkpoint. ``STOP`` drops the step and ends the run, saved as it stood before it.
    """

    GO = 0
    SKIP = 1
    ROLL_BACK = 2
    STOP = 3


def agree(wish: Decision, signal: int, last: bool) -> tuple[Decision, int, bool]:
    """Return the strongest `wish` of all ranks, the `signal` that any of them has, and whether one ends by this step.

    Of several signals it gives the largest number, 0 for none. `last` says that this rank wants to end. It takes one
    reduction of three whole numbers, which all ranks of the run enter once a step.
    """
    decision, number, ends = strongest(wish, signal, last)
    return Decision(decision), number, bool(ends)
