"""Declares the whole run as one printable tree, each node of which the component that it configures declares."""

from typing import Annotated, Any

from pydantic import model_validator

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.config.base import Config
from mmoe.config.extensions import Extensions
from mmoe.config.nature import Nature
from mmoe.data.config import DataConfig
from mmoe.errors import ConfigError
from mmoe.losses.config import LossConfig
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.engines.engine import check_dtype
from mmoe.optim.batch import BatchArithmetic
from mmoe.optim.config import OptimConfig
from mmoe.parallel.config import ParallelConfig
from mmoe.precision.config import PrecisionConfig
from mmoe.recipe.evaluation import EvaluationConfig
from mmoe.recipe.monitoring import MonitoringConfig
from mmoe.recipe.training import TrainingConfig
from mmoe.tokenizers.bundle import TokenizersConfig


class RunConfig(Config):
    """Holds everything a run is made of: the root of the config tree."""

    # First: modules whose losses, readers, optimizers and the like the keys below may name.
    extensions: Annotated[Extensions, Nature.OPERATIONAL] = ()
    data: DataConfig
    tokenizers: TokenizersConfig = TokenizersConfig()
    model: ModelConfig
    losses: LossConfig = LossConfig()
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def batch(self) -> BatchArithmetic:
        """The batch arithmetic of one replica; GB_tok and the number of steps are the same for any number of them."""
        return self.batch_of(replicas=1)

    def batch_of(self, replicas: int) -> BatchArithmetic:
        """Derive mu_tok, D, A, GB_tok and the number of steps for so many data replicas.

        Raises ConfigError where the batch does not divide.
        """
        return BatchArithmetic.from_config(
            sequence_length=self.data.sequence_length,
            micro_batch_sequences=self.training.micro_batch_sequences,
            global_batch_positions=self.training.global_batch_positions,
            budget_positions=self.training.budget_positions,
            replicas=replicas,
        )

    @property
    def contrastive_group(self) -> int:
        """The number of sequences in one contrastive group: the configured one, or all of the global batch."""
        return self.losses.contrastive.group_sequences or self.batch.sequences

    @classmethod
    def check_layer(cls, below: dict[str, Any], above: dict[str, Any]) -> None:
        """Check that a layer of config which changes the batch says what the learning rate does (recipes.md, 1).

        `below` is the tree that the layer `above` is laid over. Raises ValueError where it says nothing.
        """
        old, new = (_at(tree, "training", "global_batch_positions") for tree in (below, above))
        if old is None or new is None or old == new or _at(above, "optim", "lr", "peak") is not None:
            return
        if not any(_at(tree, "optim", "lr", "scaling_rule") for tree in (below, above)):
            raise ValueError(
                f"training.global_batch_positions changes from {old} to {new}, but nothing says what the learning rate "
                f"does: set optim.lr.reference_batch_positions={old} and optim.lr.scaling_rule=sqrt, or a new "
                "optim.lr.peak"
            )

    @model_validator(mode="after")
    def _batch(self) -> "RunConfig":
        sequences, group = self.batch.sequences, self.contrastive_group
        if sequences % group:
            raise ValueError(
                f"losses.contrastive.group_sequences is {group}, but a global batch has {sequences} sequences "
                "(training.global_batch_positions / data.sequence_length): it must be made of whole groups; set "
                "group_sequences to a divisor of them, or to null for the whole global batch"
            )
        return self

    @model_validator(mode="after")
    def _engine(self) -> "RunConfig":
        if self.model.moe is not None:
            try:
                check_dtype(self.model.moe.expert_backend, self.precision.product_dtype)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self


def _at(tree: Any, *path: str) -> Any:
    """The value under a path of keys; None where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
