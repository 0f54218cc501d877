"""How a run uses the machines it has."""

from pydantic import Field

from mmoe.config.base import Config


class ParallelConfig(Config):
    threads: int = Field(default=0, ge=0)  # CPU threads of one process; 0: as many as torch finds cores
