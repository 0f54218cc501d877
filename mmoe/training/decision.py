"""Decides what becomes of a step: the strongest wish of any callback on any rank, taken by all ranks."""

from enum import IntEnum
from typing import NamedTuple

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


class Agreement(NamedTuple):
    """Says what all ranks do about a step; of a rank, what it wants to be done."""

    decision: Decision = Decision.GO
    signal: int = 0  # the number of the signal that ends the run, of several the largest; 0: none
    last: bool = False  # the run ends with this step
    save: bool = False  # a checkpoint is written after it


def agree(wanted: Agreement) -> Agreement:
    """Return what any rank wants, the strongest wish first: one reduction of four whole numbers.

    All ranks of the run enter it once a step.
    """
    decision, signal, last, save = strongest(*wanted)
    return Agreement(Decision(decision), signal, bool(last), bool(save))
