"""What is trained for how long, and where the run is kept."""

from pydantic import Field

from mmoe.config.base import Config


class StartConfig(Config):
    """Weights that a run begins with instead of random ones; dense networks become experts where it has experts."""

    weights: str  # another run's folder, or one of Hugging Face weights (Llama, Qwen3, Mixtral, Qwen3-MoE)
    step: int | None = Field(default=None, ge=0)  # of the other run's checkpoint; null: its latest
    noise: float = Field(default=0.0, ge=0)  # on experts that are copies: its std over that of the dense matrix


class TrainingConfig(Config):
    run: str  # the run's folder, e.g. runs/demo
    seed: int = Field(default=0, ge=0)
    micro_batch_sequences: int = Field(gt=0)
    global_batch_positions: int = Field(gt=0)  # GB_tok
    budget_positions: int = Field(gt=0)  # steps = budget // GB_tok
    evaluate_at_end: bool = True
    start_from: StartConfig | None = None  # null: random weights
