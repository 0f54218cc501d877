"""Lists what the weights are called in Hugging Face's families, as one table that both directions read.

Ours are on the left, without ``.weight`` where both have it. Experts are stacked in ours, `[E, D, F]`; theirs are
E linear layers `[F, D]` in files (every checkpoint that is published), or one tensor `[E, 2 F, D]` of gate above up
in files that transformers 5 writes without converting back. Both are read; the first is written.

E: experts, D: width of the model, F: width of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmoe.interchange.folder import TensorReader
from mmoe.models.decoder import ModelConfig

MODEL = {"embeddings.token": "model.embed_tokens", "decoder.norm": "model.norm"}
UNTIED = {"unembedding": "lm_head"}
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
QK_NORM = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
DENSE_NAMES = {
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


@dataclass(frozen=True)
class ExpertNames:
    """Says under which names a family keeps a layer's router and the three matrices of expert ``{expert}``."""

    router: str
    gate: str
    up: str
    down: str


MIXTRAL = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
)
QWEN = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
)
# Of any family, in a file with the names of transformers 5's modules.
MODULE_ROUTER, MODULE_GATE_UP, MODULE_DOWN = "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class WeightRow(Protocol):
    """Describes a parameter of ours, and how it stands in a file of theirs."""

    @property
    def ours(self) -> str:
        """The name of the parameter in our models."""

    def write(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of theirs, as views of our `value`."""

    def read(self, file: TensorReader) -> Tensor:
        """Read our value from their file."""


@dataclass(frozen=True)
class Same:
    """Renames a parameter that is the same tensor in theirs; `alternative` is read where there is no `theirs`."""

    ours: str
    theirs: str
    alternative: str | None = None

    def write(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensor under their name."""
        yield self.theirs, value

    def read(self, file: TensorReader) -> Tensor:
        """Read the tensor by whichever of their names the file has."""
        if self.alternative is not None and self.alternative in file and self.theirs not in file:
            return file[self.alternative]
        return file[self.theirs]


@dataclass(frozen=True)
class Stacked:
    """Stacks the matrices of the `experts` in a parameter; each is transposed in a file of theirs.

    A tensor `fused` [E, parts F, D] may hold it as its part number `part`.
    """

    ours: str
    theirs: str
    experts: int
    fused: str
    part: int = 0
    parts: int = 1

    def write(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrix of each expert, transposed, under its own name."""
        for expert in range(self.experts):
            yield self.theirs.format(expert=expert), value[expert].T

    def read(self, file: TensorReader) -> Tensor:
        """Stack the matrices of all experts, or take this part of the fused tensor."""
        if self.fused in file:
            whole = file[self.fused].chunk(self.parts, dim=1)[self.part]
        else:
            whole = torch.stack([file[self.theirs.format(expert=expert)] for expert in range(self.experts)])
        return whole.transpose(1, 2)


def weight_rows(config: ModelConfig, experts: ExpertNames | None) -> list[WeightRow]:
    """List the parameters of the text path of a model of `config`, in the order of its forward pass."""
    table: list[WeightRow] = _same("", "", {"embeddings.token": MODEL["embeddings.token"]})
    for number in range(config.n_layers):
        ours, theirs = f"decoder.blocks.{number}.", f"model.layers.{number}."
        table += _same(ours, theirs, LAYER | (QK_NORM if config.qk_norm else {}))
        if config.moe is None or experts is None or not config.moe.in_layer(number):
            table += _same(ours, theirs, DENSE_NAMES)
            continue
        router = f"{theirs}{experts.router}.weight"
        table.append(Same(f"{ours}feed_forward.router.weight", router, f"{theirs}{MODULE_ROUTER}.weight"))
        for part, (name, each) in enumerate({"gate": experts.gate, "up": experts.up}.items()):
            fused = f"{theirs}{MODULE_GATE_UP}"
            each = f"{theirs}{each}.weight"
            experts_of = f"{ours}feed_forward.experts.{name}"
            table.append(Stacked(experts_of, each, config.moe.n_experts, fused, part, parts=2))
        down = f"{theirs}{experts.down}.weight"
        table.append(Stacked(f"{ours}feed_forward.experts.down", down, config.moe.n_experts, f"{theirs}{MODULE_DOWN}"))
    table += _same("", "", {"decoder.norm": MODEL["decoder.norm"]})
    return table if config.tie_embeddings else table + _same("", "", UNTIED)


def _same(ours: str, theirs: str, names: dict[str, str]) -> list[WeightRow]:
    return [Same(f"{ours}{mine}.weight", f"{theirs}{name}.weight") for mine, name in names.items()]
