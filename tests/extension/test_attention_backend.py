"""An attention backend that this file alone defines: named in a config, trained on one process and on two, planned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmoe.config import registry
from mmoe.config.load import dump, load, validate
from mmoe.errors import ConfigError, PackageError
from mmoe.models.attention.backend import ATTENTION_BACKENDS, AttentionBackend, differentiable
from mmoe.models.decoder import ModelConfig
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import ParallelDims
from mmoe.parallel.parallelize import check_layout, recompute_and_compile
from mmoe.planning.dry_run_plan import Plan
from mmoe.recipe.config import RunConfig
from mmoe.schema.batch import PackedBatch
from tests.distributed.compare import differences
from tests.distributed.pool import Pool
from tests.distributed.step import MODEL, Case, train
from tests.models.random_batch import INPUTS, random_batch
from tests.planning.dry_run_small import plan
from tests.planning.test_flops import WIDE


@ATTENTION_BACKENDS.register("matmul")
@dataclass(frozen=True)
class MatmulAttention(AttentionBackend):
    """Two plain products a document, with a softmax in float32 or wider between them."""

    supports_cp = True
    saved_ops = frozenset({torch.ops.aten.bmm.default})
    backward_flops = 2.0  # nothing is computed again

    documents: tuple[tuple[int, int, bool], ...]  # first position, that behind the last, whether it is padding

    @classmethod
    def from_batch(cls, batch: PackedBatch, bidirectional: bool) -> "MatmulAttention":
        border, document = batch.cu_seqlens.tolist(), batch.document.flatten()
        return cls(tuple((a, b, bool(document[a] < 0)) for a, b in pairwise(border)))

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (q_BLHK, k_BLGK, v_BLGK))
        parts = []
        for first, stop, padding in self.documents:
            here = (x[:, :, first:stop] for x in (q, k, v))
            causal = torch.ones(stop - first, stop - first, dtype=torch.bool, device=q.device).tril()
            parts.append(torch.zeros_like(q[:, :, first:stop]) if padding else self.attend_masked(*here, causal))
        out = torch.cat(parts, 2)[0].transpose(0, 1)
        return differentiable(out, q_BLHK, k_BLGK, v_BLGK).reshape(q_BLHK.shape).to(v_BLGK.dtype)

    @classmethod
    def attend_masked(cls, q_bHnK: Tensor, k_bGmK: Tensor, v_bGmK: Tensor, mask_nm: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q_bHnK.shape[1] // x.shape[1], 1) for x in (k_bGmK, v_bGmK))
        scores = q_bHnK @ k.mT / math.sqrt(q_bHnK.shape[-1])
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.masked_fill(~mask_nm, -torch.inf).softmax(-1, dtype=wide).to(v.dtype) @ v

    @classmethod
    def flops(cls, documents: Sequence[int], heads: int, head_dim: int) -> int:
        return 4 * sum(length**2 for length in documents) * heads * head_dim


class OnGpuAttention(MatmulAttention):
    """For what is said of a machine without its device."""

    requires = ("cuda",)


CAUSAL = {"bidirectional_slices": False}
OURS = Case(micro=2, model=CAUSAL | {"attention": "matmul"})


def trained(case: Case, world: int) -> dict[str, np.ndarray]:
    """All weights after two steps. It stands here so that the processes that run it import this module."""
    return train(case, world, muon=False, steps=2)


@cache
def built_in() -> dict[str, np.ndarray]:
    return trained(replace(OURS, model=CAUSAL), 1)


def test_it_trains_to_the_weights_of_a_built_in_one() -> None:
    assert not differences("weights", trained(OURS, 1), built_in(), 1e-11)


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"cp": 2}], ids=str)
def test_it_trains_on_two_processes_to_the_weights_of_one(two: Pool, parallel: dict[str, int]) -> None:
    assert not differences("weights", two.run(trained, replace(OURS, parallel=parallel), 2)[0], built_in(), 1e-11)


def test_a_package_offers_it_and_yaml_names_it(monkeypatch, tmp_path) -> None:
    point = EntryPoint("theirs", f"{__name__}:MatmulAttention", "mmoe.attention")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    config = load(RunConfig, "configs/moe_10b.yaml", ["model.attention=theirs", "model.bidirectional_slices=false"])
    assert config.model.attention_class is MatmulAttention
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match="model.attention: 'thers' is not a kind of attention backend; did you mean"):
        load(RunConfig, "configs/moe_10b.yaml", ["model.attention=thers"])


def test_what_it_cannot_do_is_refused_with_what_can() -> None:
    words = "bidirectional_slices is true, but attention is matmul, which lacks that rule; set it to .*sdpa_documents"
    with pytest.raises(ConfigError, match=words):
        validate(ModelConfig, MODEL | {"attention": "matmul"}, "test")
    dense = validate(ModelConfig, MODEL | {"attention": "dense"}, "test")
    with pytest.raises(ConfigError, match="set it to matmul or sdpa_documents, or parallel.cp to 1"):
        check_layout(dense, ParallelDims(cp=2))


def test_a_device_that_it_requires_and_that_is_not_there_stops_a_run_at_its_start(monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setitem(ATTENTION_BACKENDS._registered, "on_gpu", OnGpuAttention)
    config = validate(ModelConfig, MODEL | CAUSAL | {"attention": "on_gpu"}, "test")
    with pytest.raises(PackageError, match="model.attention asks for cuda, not available because"):
        config.build(INPUTS, 0)


class Products(TorchDispatchMode):
    """Counts the products that the backend says are kept."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        self.count += function is torch.ops.aten.bmm.default
        return function(*arguments, **(options or {}))


def test_selective_recomputation_computes_what_it_saves_once() -> None:
    counts, gradients = {}, {}
    for kind in ("none", "selective", "full"):
        model = validate(ModelConfig, MODEL | CAUSAL | {"attention": "matmul"}, "test").build(INPUTS, 7).train()
        recompute_and_compile(model, ParallelConfig(activation_checkpointing=kind))
        with Products() as products:
            model(random_batch(0)).hidden.square().mean().backward()
        counts[kind] = products.count
        gradients[kind] = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert 0 < counts["none"] == counts["selective"] < counts["full"]
    assert not differences("gradients", gradients["selective"], gradients["none"], 0)


def test_a_dry_run_counts_the_operations_that_it_states() -> None:
    def planned(attention: str) -> Plan:
        step = "data.sequence_length=512 training.global_batch_positions=8192 parallel.tp=2"
        return plan(4, f"{WIDE} {step} model.bidirectional_slices=false model.attention={attention}", documents=1)

    ours, theirs = planned("matmul"), planned("sdpa_documents")
    assert ours.flops(3) == pytest.approx(ours.cost(3).flops, rel=0.08)
    assert ours.flops(3) > 1.02 * theirs.flops(3)
