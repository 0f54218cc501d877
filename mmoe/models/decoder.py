"""Defines the model: embeddings, a pre-norm decoder of dense or mixture-of-experts blocks, and its heads.

Shape suffixes: B sequences, L positions, D model width, V ids, n chosen positions; M action chunks of H steps of A
dimensions; P contrastive pairs; N layers of experts, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from mmoe.config.base import Config
from mmoe.errors import ConfigError
from mmoe.models.attention.backend import ATTENTION_BACKENDS, AttentionBackend
from mmoe.models.attention.module import Attention
from mmoe.models.batch_context import BatchContext
from mmoe.models.embeddings import Embeddings, ModelInputs
from mmoe.models.heads import ActionHead, ContrastHead
from mmoe.models.init import initialize
from mmoe.models.layers import RMSNorm, SwiGLU
from mmoe.models.moe.balance import BalanceConfig, ExpertLoadAccumulator, balance_loss
from mmoe.models.moe.layer import MAX_WIDTH, LayerRouting, MoEConfig, MoELayer
from mmoe.models.moe.router import Router
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.optional import require
from mmoe.schema.batch import PackedBatch, Pairs


class ModelConfig(Config):
    """Configures the decoder: its sizes, attention, embeddings and experts."""

    d_model: int = Field(gt=0, le=MAX_WIDTH)  # width of the hidden states
    n_layers: int = Field(gt=0, le=10_000)  # blocks
    n_heads: int = Field(gt=0, le=MAX_WIDTH)  # query heads
    n_kv_heads: int = Field(gt=0, le=MAX_WIDTH)  # key and value heads, each shared by query heads
    head_dim: int | None = Field(default=None, gt=0, le=MAX_WIDTH)  # null: d_model / heads
    intermediate_size: int = Field(gt=0, le=MAX_WIDTH)  # SwiGLU width of dense layers
    rope_theta: float = Field(default=10_000.0, gt=0)  # base of the rotary frequencies
    qk_norm: bool = False  # RMS norms of queries and keys
    norm_eps: float = Field(default=1e-6, gt=0)  # of every RMS norm
    bidirectional_slices: bool = False  # the VISION positions of a slice see one another
    attention: Annotated[str, AfterValidator(ATTENTION_BACKENDS.known)] = "sdpa_documents"  # kind of the backend
    tie_embeddings: bool = True  # the token table is the unembedding too
    init_std: float = Field(default=0.02, gt=0)  # of token and camera tables; see mmoe.models.init
    contrast_dim: int = Field(default=128, gt=0, le=MAX_WIDTH)  # width of the embeddings that InfoNCE compares
    moe: MoEConfig | None = None  # null: every layer is dense

    @model_validator(mode="after")
    def _shape(self) -> "ModelConfig":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}, not a multiple of n_kv_heads {self.n_kv_heads}; every key/value head "
                "serves the same number of query heads: change one of them"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; change one of them or set "
                "head_dim"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim is {self.head_width}, but rotary positions turn pairs; make it even")
        if self.moe is not None and not any(map(self.moe.in_layer, range(self.n_layers))):
            raise ValueError(
                f"model.moe.layer_freq {self.moe.layer_freq} and first_k_dense {self.moe.first_k_dense} leave "
                f"none of the {self.n_layers} layers with experts; lower them or set model.moe to null"
            )
        if self.moe is not None:
            self.moe.check_width("d_model", self.d_model)
        if self.bidirectional_slices and "bidirectional_slices" not in self.attention_class.rules:
            others = ATTENTION_BACKENDS.kinds_that(lambda backend: "bidirectional_slices" in backend.rules)
            raise ValueError(
                f"bidirectional_slices is true, but attention is {self.attention}, which lacks that rule; set it to "
                f"{others}, or bidirectional_slices to false"
            )
        return self

    @property
    def attention_class(self) -> type[AttentionBackend]:
        """The class of the attention backend."""
        return ATTENTION_BACKENDS.find(self.attention)

    @property
    def head_width(self) -> int:
        """The width of a head: `head_dim`, or what d_model has for each head."""
        return self.head_dim or self.d_model // self.n_heads

    def build(self, inputs: ModelInputs, seed: int, heads: Mapping[str, nn.Module] | None = None) -> "MultimodalModel":
        """Build the model with its initial weights, float32 on the CPU; `heads` as `MultimodalModel` takes them."""
        model = MultimodalModel(self, inputs, heads)
        initialize(model, seed, self.init_std, self.n_layers)
        return model


class Block(nn.Module):
    """Adds attention(norm(x)) to x, then network(norm(x)); the network of layer `number` is dense or has experts."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        size, eps = config.d_model, config.norm_eps
        self.attention_norm = RMSNorm(size, eps)
        self.attention = Attention(size, config.n_heads, config.n_kv_heads, config.head_width, config.qk_norm, eps)
        self.ffn_norm = RMSNorm(size, eps)
        self.feed_forward: nn.Module = (
            MoELayer(size, config.moe, number)
            if config.moe is not None and config.moe.in_layer(number)
            else SwiGLU(size, config.intermediate_size)
        )

    def forward(self, x_BLD: Tensor, context: BatchContext) -> tuple[Tensor, LayerRouting | None]:
        """Send [B, L, D] through attention and network, and return also what was routed (None where it is dense)."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), context.rotary, context.attention)
        normed = self.ffn_norm(x_BLD)
        if isinstance(self.feed_forward, MoELayer):
            out, routing = self.feed_forward(normed, context.tokens)
        else:
            out, routing = self.feed_forward(normed), None
        return x_BLD + out, routing


class RouterTerms(Protocol):
    """Gives the losses of a batch's routers, wherever their layers ran."""

    def terms(self, loads: ExpertLoadAccumulator, config: BalanceConfig) -> dict[str, Tensor]:
        """Return the routers' losses by name: ``balance_<level>`` of the levels that count, and ``router_z``.

        They are means over the batch's sequences and the layers of experts. `loads` are those of the step before this
        batch; its own are added.
        """


@dataclass(frozen=True)
class RouterAuxLosses:
    """Holds what the router losses are made of, with gradient.

    `balance_loss` (of the sequences) and `z_loss` are means over the batch's sequences and the layers of experts.
    By layer of experts: `load_NE` i64 counts the slots of each expert before any drop, `probability_NE` is its
    mean probability over the batch's valid tokens.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load_NE: Tensor
    probability_NE: Tensor

    def terms(self, loads: ExpertLoadAccumulator, config: BalanceConfig) -> dict[str, Tensor]:
        """Return the routers' losses by name: ``balance_<level>`` of the levels that count, and ``router_z``.

        They are means over the batch's sequences and the layers of experts. `loads` are those of the step before this
        batch; its own are added.
        """
        loads.add(self.load_NE)
        terms = {}
        if config.sequence:
            terms["balance_sequence"] = self.balance_loss
        if config.micro_batch:
            terms["balance_micro_batch"] = balance_loss(self.load_NE, self.probability_NE).mean()
        if config.global_batch:
            terms["balance_global_batch"] = balance_loss(loads.total(), self.probability_NE).mean()
        return terms | {"router_z": self.z_loss}


@dataclass(frozen=True)
class ModelOutput:
    """Holds the hidden states of a batch after the last norm, and what its layers of experts routed.

    `hidden`: [B, L, D], at padding finite and without meaning. `auxiliary` is None without experts, `routing` (a
    layer of experts each) also in evaluation.
    """

    hidden: Tensor
    auxiliary: RouterTerms | None
    routing: RoutingStatistics | None


class Decoder(nn.Module):
    """Runs the blocks of the decoder one after another, with a norm behind the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name in config.attention_class.requires:
            require(name, "model.attention")
        self.blocks = nn.ModuleList([Block(config, number) for number in range(config.n_layers)])
        self.norm: nn.Module = RMSNorm(config.d_model, config.norm_eps)

    @property
    def routers(self) -> list[Router]:
        """The routers of the layers of experts here, in the order of the routing statistics."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]  # not the nn.Identity of another stage
        return [block.feed_forward.router for block in blocks if isinstance(block.feed_forward, MoELayer)]

    def forward(self, x_BLD: Tensor, context: BatchContext) -> ModelOutput:
        """Send the embedded batch [B, L, D] through all blocks and the last norm."""
        x_BLD, routed = self.run_layers(x_BLD, context, range(len(self.blocks)))
        return ModelOutput(self.norm(x_BLD), *collect_routing(routed))

    def run_layers(self, x_BLD: Tensor, context: BatchContext, layers: range) -> tuple[Tensor, list[LayerRouting]]:
        """Run the blocks of `layers`, without the last norm, and return also what each layer of experts routed."""
        routed: list[LayerRouting] = []
        for number in layers:
            x_BLD, routing = self.blocks[number](x_BLD, context)
            if routing is not None:
                routed.append(routing)
        return x_BLD, routed


def collect_routing(routed: list[LayerRouting]) -> tuple[RouterAuxLosses | None, RoutingStatistics | None]:
    """Combine what the layers of experts of a forward pass routed, in their order; (None, None) without experts."""
    if not routed:
        return None, None
    zero = routed[0].z_loss.new_zeros(())
    auxiliary = RouterAuxLosses(
        balance_loss=sum((layer.balance_loss for layer in routed), start=zero) / len(routed),
        z_loss=sum((layer.z_loss for layer in routed), start=zero) / len(routed),
        load_NE=torch.stack([layer.load_E for layer in routed]),
        probability_NE=torch.stack([layer.probability_E for layer in routed]),
    )
    statistics = [layer.statistics for layer in routed if layer.statistics is not None]
    return auxiliary, RoutingStatistics.stack(statistics) if statistics else None


class MultimodalModel(nn.Module):
    """Maps a PackedBatch to hidden states; its heads are called on those of them that a loss or a user wants."""

    def __init__(self, config: ModelConfig, inputs: ModelInputs, heads: Mapping[str, nn.Module] | None = None) -> None:
        """Make the model of `config` for the `inputs` of its data.

        `heads` are further modules that read hidden states, by name: those of loss terms that have one.
        """
        super().__init__()
        size = config.d_model
        self.embeddings = Embeddings(inputs, size)
        self.decoder = Decoder(config)
        self.unembedding = None if config.tie_embeddings else nn.Linear(size, inputs.vocabulary_size, bias=False)
        self.action = ActionHead(size, inputs.action_chunk, inputs.action_dim) if inputs.action_dim else None
        self.contrastive = ContrastHead(size, config.contrast_dim)
        self.heads = nn.ModuleDict(dict(heads or {}))
        for name, module in (*self.heads.items(), *self.embeddings.values.items()):
            if buffer := next((held for held, _ in module.named_buffers()), None):
                raise ConfigError(
                    f"the module of {name} has a buffer, {buffer}, which a rank built without memory would lose; "
                    "make it a parameter, or work it out in its forward pass"
                )

    def forward(self, batch: PackedBatch, context: BatchContext | None = None) -> ModelOutput:
        """Embed the batch and send it through the decoder.

        Without a `context` the batch is whole; with one, the batch holds the positions that the context is of.
        """
        x_BLD = self.embeddings(batch)
        return self.decoder(x_BLD, context or BatchContext.from_batch(batch, self.decoder.config, x_BLD.dtype))

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Score every id as the one that follows each chosen position, [n, D] -> [n, V]."""
        return F.linear(hidden_nD, self.unembedding_weight)

    @property
    def unembedding_weight(self) -> Tensor:
        """The weight [V, D] that hidden states are scored with."""
        return (self.embeddings.token if self.unembedding is None else self.unembedding).weight

    def actions(self, hidden_MD: Tensor) -> Tensor:
        """Predict the continuous action chunk read at each `action` token, [M, D] -> [M, H, A], normalized units."""
        assert self.action is not None  # no source without an action chunk has such tokens
        return self.action(hidden_MD)

    def contrast(self, hidden_BLD: Tensor, pairs: Pairs, modality_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the two sides of each pair, [P, contrast_dim] each, every row of length 1."""
        return self.contrastive(hidden_BLD, pairs, modality_BL)
