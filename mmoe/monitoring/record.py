"""Declares the record of a step, which every sink is given."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class StepRecord:
    """Says what a run did up to and with one logged step.

    `step` counts optimizer steps from 1, `session` the starts of the run from 0. `scalars` are flat: one of several of
    a kind is named ``kind/which``. `tables` are counts (integers) and means (floats) by layer, expert and the like;
    empty but every `monitoring.tables_every_steps` steps. `notes` are texts: the stage of the data, a digest.
    """

    step: int
    session: int
    scalars: dict[str, float] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
