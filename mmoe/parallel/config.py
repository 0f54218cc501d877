"""Configures how a run uses the machines it has."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.config.nature import Nature

Degree = Field(default=1, gt=0)


class ParallelConfig(Config):
    """Configures how a run uses the machines it has: the degrees of parallelism, and what goes with them.

    The degrees multiply to the number of processes that torchrun starts (`mmoe.parallel.mesh`).

    ============ =================================================================================================
    dp_replicate replicas of all weights, whose gradients are summed
    dp_shard     ranks that see different data and share one replica's weights (FSDP2)
    cp           ranks that share the positions of a sequence
    tp           ranks that share the matrices of attention and FFN, the vocabulary, and the positions in between
    pp           ranks that share the layers
    ep           ranks that share the experts; borrowed from dp_shard x cp x tp, so it adds no processes
    ============ =================================================================================================

    ZeRO stages (Rajbhandari et al. 2020) are settings of FSDP2: 3 gathers weights anew in the backward pass, 2 keeps
    them from the forward pass, 1 keeps them and adds up gradients over a whole step before it reduces them.
    """

    nature: ClassVar[Nature] = Nature.LAYOUT

    pp: int = Degree  # ranks that share the layers
    dp_replicate: int = Degree  # copies of the weights
    dp_shard: int = Field(default=-1, ge=-1)  # -1: the processes that the others leave
    cp: int = Degree  # ranks that share the positions of a sequence
    tp: int = Degree  # ranks that share matrices
    ep: int = Degree  # ranks that share the experts
    zero: Literal[1, 2, 3] = 3  # stage: 3 gathers weights anew for the backward pass
    offload: bool = False  # parameters, gradients and optimizer states live in the CPU's memory
    # What is computed again in the backward pass.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # norms and dense networks by torch.compile
    schedule: Literal["1f1b", "interleaved_1f1b"] = "1f1b"  # of the pipeline
    stages_per_rank: int = Field(default=1, gt=0)  # more than one with interleaved_1f1b
    # Of a collective, before the run stops with a hang report.
    timeout_seconds: Annotated[float, Nature.OPERATIONAL] = Field(default=600.0, gt=0)
    threads: int = Field(default=0, ge=0)  # CPU threads of one process; 0: torch's own choice, or OMP_NUM_THREADS

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.dp_shard == 0:
            raise ValueError("dp_shard is 0; give a number of ranks, or -1 for the rest of the processes")
        if (self.schedule == "interleaved_1f1b") != (self.stages_per_rank > 1):
            raise ValueError(
                f"schedule is {self.schedule} with stages_per_rank {self.stages_per_rank}: interleaved_1f1b and "
                "several stages a rank belong together; set both or neither"
            )
        if self.stages_per_rank > 1 and self.pp == 1:
            raise ValueError("stages_per_rank is more than 1, but pp is 1; raise pp or lower stages_per_rank")
        return self
