"""What is trained for how long, and where the run is kept."""

from pydantic import Field

from mmoe.config.base import Config


class TrainingConfig(Config):
    run: str  # the run's folder, e.g. runs/demo
    seed: int = Field(default=0, ge=0)
    micro_batch_sequences: int = Field(gt=0)
    global_batch_positions: int = Field(gt=0)  # GB_tok
    budget_positions: int = Field(gt=0)  # steps = budget // GB_tok
    evaluate_at_end: bool = True
