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


def agree(wish: Decision, last: bool) -> tuple[Decision, bool]:
    """Return the strongest `wish` of all ranks, and whether any of them wants this step to be the `last`.

    It takes one reduction of two whole numbers, which all ranks of the run enter once a step.
    """
    decision, ends = strongest(wish, last)
    return Decision(decision), bool(ends)
