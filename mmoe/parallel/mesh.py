"""Says which rank is where on which axis, for dense parameters and for experts.

::

    dense   pp, dp_replicate, dp_shard, cp, tp        (the last axis varies fastest from rank to rank)
    weights pp, dp_replicate, fsdp, tp                fsdp = dp_shard cp: who shares a dense weight
    sparse  pp, dp_replicate, edp, ep        edp = dp_shard cp tp / ep: EP borrows ranks

Ranks that differ in dp_replicate or dp_shard alone see different data; ranks that differ in pp, cp or tp alone are
*peers* of one data replica.
"""

import math
import shlex
import sys
from dataclasses import dataclass

import torch.distributed as dist
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mmoe.compat import flatten_mesh
from mmoe.errors import ConfigError
from mmoe.parallel.config import ParallelConfig

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
WEIGHTS = ("pp", "dp_replicate", "fsdp", "tp")
DEGREES = (*DENSE_AXES, "ep")
SPARSE = ("pp", "dp_replicate", "edp", "ep")


@dataclass(frozen=True)
class ParallelDims:
    """Holds the number of ranks on each axis; `ep` is not a factor of their number."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def from_config(cls, config: ParallelConfig, world: int) -> "ParallelDims":
        """Derive the degrees of `world` processes.

        Raises ConfigError, with the arithmetic, where they do not multiply to it.
        """
        dims = {axis: getattr(config, axis) for axis in DEGREES}
        given = {axis: degree for axis, degree in dims.items() if axis not in ("dp_shard", "ep")}
        product, formula = 1, []
        for axis, degree in given.items():
            product *= degree
            formula.append(f"{axis} {degree}")
        if config.dp_shard == -1:
            if world % product:
                raise ConfigError(
                    f"parallel.dp_shard is the rest of {world} processes, but {' x '.join(formula)} = {product} does "
                    f"not divide {world}; change a degree, or start {max(world // product, 1) * product} processes"
                )
            dims["dp_shard"] = world // product
        elif product * config.dp_shard != world:
            raise ConfigError(
                f"parallel: {' x '.join(formula)} x dp_shard {config.dp_shard} = {product * config.dp_shard}, but "
                f"there are {world} processes; change a degree, set dp_shard to -1 (the rest), or start "
                f"{product * config.dp_shard} processes with torchrun --nproc-per-node"
            )
        found = cls(**dims)
        lent = found.dp_shard * found.cp * found.tp
        if lent % found.ep:
            raise ConfigError(
                f"parallel.ep is {found.ep}, which does not divide the dp_shard {found.dp_shard} x cp {found.cp} x tp "
                f"{found.tp} = {lent} ranks that it borrows; change one of them"
            )
        return found

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """The number of data replicas, D."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """The number of ranks that share a dense weight."""
        return self.dp_shard * self.cp

    @property
    def edp(self) -> int:
        """The number of ranks that share the weights of the same experts."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks that share the positions of a sequence outside attention."""
        return self.cp * self.tp

    def table(self) -> Table:
        """Make the table of the axes, to be printed at the start of a run."""
        table = Table("mesh", "ranks", "of", title_justify="left")
        table.columns[1].justify = "right"
        what = {
            "pp": "layers",
            "dp_replicate": "data, with copies of the weights",
            "dp_shard": "data, with shards of the weights",
            "cp": "positions of a sequence",
            "tp": "heads, FFN columns, vocabulary; positions in between",
        }
        for axis in DENSE_AXES:
            table.add_row(axis, str(getattr(self, axis)), what[axis])
        table.add_row("processes", str(self.world), " x ".join(str(getattr(self, axis)) for axis in DENSE_AXES))
        table.add_row("ep", str(self.ep), f"experts, borrowed from dp_shard x cp x tp = {self.edp * self.ep}")
        table.add_row("edp", str(self.edp), "dp_shard x cp x tp / ep")
        return table


def check_one_process(config: ParallelConfig) -> None:
    """Raise `ConfigError` where the degrees need several processes and torchrun has not started them."""
    if dist.is_initialized():
        return
    sequence = config.cp * config.tp
    shard = config.dp_shard if config.dp_shard > 0 else config.ep // math.gcd(config.ep, sequence)
    world = max(config.pp * config.dp_replicate * shard * sequence, config.ep)
    if world == 1:
        if config.offload:
            raise ConfigError(
                "parallel.offload is true, which is FSDP's work and needs a process group; "
                "set it to false, or start by: torchrun --nproc-per-node 1 -m mmoe " + shlex.join(sys.argv[1:])
            )
        return
    dims = [f"parallel.{name}={getattr(config, name)}" for name in ("pp", "dp_replicate", "cp", "tp", "ep")]
    given = [text for text in dims if not text.endswith("=1")]
    given += [f"parallel.dp_shard={config.dp_shard}"] if config.dp_shard > 1 else []
    raise ConfigError(
        f"{', '.join(given)} needs several processes, but this is one that torchrun did not start; "
        f"start it by: torchrun --nproc-per-node {world} -m mmoe {shlex.join(sys.argv[1:])}"
    )


class Mesh:
    """Holds the process groups of a run, by axis.

    Needs an initialized default process group of ``dims.world`` ranks.
    """

    def __init__(self, dims: ParallelDims, device_type: str = "cpu") -> None:
        self.dims = dims

        def made(axes: tuple[str, ...]) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(getattr(dims, axis) for axis in axes), mesh_dim_names=axes)

        self.dense, self._weights, self._sparse = made(DENSE_AXES), made(WEIGHTS), made(SPARSE)
        # Flattened once, on every rank in the same order: making a group is a collective.
        joined = {
            "data": ("dp_replicate", "dp_shard"),
            "sequence": ("cp", "tp"),
            "loss": ("dp_replicate", "dp_shard", "cp", "tp"),
        }
        self._joined = {name: flatten_mesh(self.dense[axes], name) for name, axes in joined.items()}
        self.peers = self._peers()

    def _peers(self) -> dist.ProcessGroup:
        """Make the group of the ranks that work on the same data.

        They are this one and those that differ from it in pp, cp or tp alone.
        """
        ranks = self.dense.mesh.permute(1, 2, 0, 3, 4).reshape(self.dims.replicas, -1).tolist()
        mine, _ = dist.new_subgroups_by_enumeration(ranks)
        assert isinstance(mine, dist.ProcessGroup)  # every rank is among the `ranks`
        return mine

    def size(self, axis: str) -> int:
        """Give the number of ranks on an axis."""
        return self.axis(axis).size()

    def rank(self, axis: str) -> int:
        """Give the place of this rank on `axis`."""
        return self.axis(axis).get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Give the process group of this rank on an axis."""
        return self.axis(axis).get_group()

    def axis(self, axis: str) -> DeviceMesh:
        """Return the one-dimensional mesh of an axis.

        The axes are those of dense, ``fsdp`` (dp_shard x cp), ``edp``, ``ep``, and ``data`` (dp_replicate x dp_shard),
        ``sequence`` (cp x tp) and ``loss`` (data x sequence).
        """
        if axis in self._joined:
            return self._joined[axis]
        if axis in ("edp", "ep"):
            return self._sparse[axis]
        return self._weights[axis] if axis in ("fsdp", "tp") else self.dense[axis]

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh of dense parameters: fsdp, or dp_replicate x fsdp where there are copies."""
        return self._weights[("dp_replicate", "fsdp") if self.dims.dp_replicate > 1 else "fsdp"]

    @property
    def edp_fsdp(self) -> DeviceMesh:
        """The mesh of experts: edp, or dp_replicate x edp where there are copies."""
        return self._sparse[("dp_replicate", "edp") if self.dims.dp_replicate > 1 else "edp"]

    @property
    def replica(self) -> int:
        """The data replica that this rank works for, from 0."""
        return self.rank("data")

    @property
    def replicas(self) -> int:
        """The number of data replicas."""
        return self.dims.replicas
