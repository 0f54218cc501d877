"""Configures what is trained for how long, and where the run is kept."""

from typing import Annotated

from pydantic import Field

from mmoe.config.base import Address, Config
from mmoe.config.nature import Nature
from mmoe.recipe.callbacks import ChosenCallbacks


class StartConfig(Config):
    """Names the weights that a run begins with instead of random ones.

    Dense networks become experts where the run has experts.
    """

    weights: Address  # another run's folder, or one of Hugging Face weights (Llama, Qwen3, Mixtral, Qwen3-MoE)
    step: int | None = Field(default=None, ge=0)  # of the other run's checkpoint; null: its latest
    noise: float = Field(default=0.0, ge=0)  # on experts that are copies: its std over that of the dense matrix


class TrainingConfig(Config):
    """Says where a run lives, how large its steps are, how long it lasts and how it begins."""

    run: Annotated[Address, Nature.OPERATIONAL]  # the run's folder, e.g. runs/demo
    seed: int = Field(default=0, ge=0)  # of weights, data and noise
    # Null: all of a replica's share of the global batch.
    micro_batch_sequences: Annotated[int | None, Nature.LAYOUT] = Field(default=None, gt=0, le=1 << 20)
    global_batch_positions: int = Field(gt=0, le=1 << 40)  # GB_tok
    budget_positions: Annotated[int, Nature.EXTENDABLE] = Field(gt=0, le=1 << 60)  # steps = budget // GB_tok
    start_from: StartConfig | None = None  # null: random weights
    # Told of every step in this order, before what records and shows it.
    callbacks: Annotated[ChosenCallbacks, Nature.OPERATIONAL] = ()

    @property
    def heldout_sequences(self) -> int:
        """The number of sequences in a held-out batch: one where a micro-batch depends on the number of replicas."""
        return self.micro_batch_sequences or 1
