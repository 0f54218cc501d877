"""What a layer of experts costs: beside a dense network of the same active FLOPs, and beside transformers' block.

    python benchmarks/moe_layer.py

One layer, forward and backward, bfloat16 weights on the CPU: 4096 tokens in 4 sequences, width 512, experts of hidden
width 1024, top-2. Ours is the whole `MoELayer` in training: router, both losses, dispatch, experts, statistics. The
others do less: transformers' Qwen3-MoE block has neither losses nor statistics. All sides step in turn in one process
(A B C A B C ...); a ratio is the median of the rounds' ratios. Prints a table and a last line RESULT {json}.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import mmoe.models.moe.layer as layer_module
from mmoe.commands.console import Console
from mmoe.models.layers import SwiGLU
from mmoe.models.moe.layer import MoEConfig, MoELayer
from mmoe.models.moe.tokens import Tokens
from mmoe.result import print_result, target
from mmoe.schema.modality import Modality

SEQUENCES, LENGTH, WIDTH, HIDDEN, EXPERTS, TOP_K = 4, 1024, 512, 1024, 8, 2
MANY_EXPERTS = 64
SOURCES = 4
SECONDS = 30
COEFFICIENT = 1e-2  # of each loss of the router
PARITY = 0.02  # share of tokens whose output differs by over 5 %: near ties, which theirs routes in bfloat16
Step = Callable[[], object]


def random_tokens() -> Tokens:
    """Of a batch without padding, so that all sides have the same work."""
    count = SEQUENCES * LENGTH
    position = torch.arange(count)
    return Tokens(
        position_T=position,
        number_N=position,
        sequence_T=position // LENGTH,
        modality_T=torch.randint(len(Modality), (count,)),
        source_T=torch.randint(SOURCES, (count,)),
        id_BL=torch.zeros(SEQUENCES, LENGTH, dtype=torch.long),
        sources=SOURCES,
    )


def moe_layer(experts: int, capacity_factor: float | None = None) -> MoELayer:
    config = MoEConfig(n_experts=experts, top_k=TOP_K, intermediate_size=HIDDEN, capacity_factor=capacity_factor)
    return initialize(MoELayer(WIDTH, config)).bfloat16()


def transformers_block(ours: MoELayer, implementation: str) -> Qwen3MoeSparseMoeBlock:
    """With the weights of our layer."""
    config = Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    block = Qwen3MoeSparseMoeBlock(config).bfloat16()
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate, ours.experts.up], 2).mT)
        block.experts.down_proj.copy_(ours.experts.down.mT)
    return block


def initialize(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def step_of(module: nn.Module, forward: Callable[[Tensor], list[Tensor]], x: Tensor, upstream: Tensor) -> Step:
    """Forward and backward from fresh gradients; `forward` gives the output and the losses added to it."""

    def step() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        x.grad = None
        output, *losses = forward(x)
        torch.autograd.backward([output, *losses], [upstream, *(torch.full_like(l, COEFFICIENT) for l in losses)])

    return step


def moe_step(layer: MoELayer, tokens: Tokens, x: Tensor, upstream: Tensor) -> Step:
    def forward(x: Tensor) -> list[Tensor]:
        output, routed = layer(x, tokens)
        return [output, routed.balance_loss, routed.z_loss]

    return step_of(layer, forward, x, upstream)


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, after two rounds of warming up."""
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    stop, warm = None, 0
    while stop is None or time.perf_counter() < stop:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if stop is not None:
                rounds[name].append((time.perf_counter() - begin) * 1e3)
        warm += 1
        if warm == 2:
            stop = time.perf_counter() + seconds
    return rounds


def ratio(rounds: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(rounds[a], rounds[b]))


@contextmanager
def timed_parts(layer: MoELayer) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each call of the forward pass's parts."""
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            times.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)
            return result

        return run

    dispatcher = layer.dispatcher
    with (
        mock.patch.object(layer.router, "forward", timed("router", layer.router.forward)),
        mock.patch.object(dispatcher, "plan", timed("plan", dispatcher.plan)),
        mock.patch.object(dispatcher, "dispatch", timed("dispatch", dispatcher.dispatch)),
        mock.patch.object(layer.experts, "forward", timed("experts", layer.experts.forward)),
        mock.patch.object(dispatcher, "combine", timed("combine", dispatcher.combine)),
        mock.patch.object(
            layer_module.RoutingStatistics, "of", timed("statistics", layer_module.RoutingStatistics.from_routing)
        ),
    ):
        yield times


def main() -> None:
    console = Console(width=110)
    torch.manual_seed(0)
    tokens = random_tokens()
    x = torch.randn(SEQUENCES, LENGTH, WIDTH).bfloat16().requires_grad_()
    upstream = torch.randn(SEQUENCES, LENGTH, WIDTH).bfloat16()
    layer = moe_layer(EXPERTS)

    blocks = {name: transformers_block(layer, name) for name in ("eager", "batched_mm", "grouped_mm")}
    for block in (blocks["eager"], blocks["grouped_mm"]):
        with torch.no_grad():
            theirs, ours = block(x).float(), layer(x, tokens)[0].float()
        differing = ((ours - theirs).norm(dim=-1) > 0.05 * theirs.norm(dim=-1)).float().mean().item()
        if differing > PARITY:
            raise SystemExit(f"{differing:.1%} of the tokens differ from transformers' output: not the same work")

    def theirs_step(name: str) -> Step:
        return step_of(blocks[name], lambda x: [blocks[name](x)], x, upstream)

    begin = time.perf_counter()
    blocks["batched_mm"].experts(x[0, :16], torch.zeros(16, TOP_K, dtype=torch.long), torch.ones(16, TOP_K).bfloat16())
    batched = (time.perf_counter() - begin) * 1e3 * SEQUENCES * LENGTH / 16  # it copies a weight for every choice

    dense = initialize(SwiGLU(WIDTH, TOP_K * HIDDEN)).bfloat16()
    steps = {
        "dense SwiGLU": step_of(dense, lambda x: [dense(x)], x, upstream),
        "dropless": moe_step(layer, tokens, x, upstream),
        "capacity 1.25": moe_step(moe_layer(EXPERTS, 1.25), tokens, x, upstream),
        "transformers eager": theirs_step("eager"),
        "transformers grouped_mm": theirs_step("grouped_mm"),
        f"{MANY_EXPERTS} experts": moe_step(moe_layer(MANY_EXPERTS), tokens, x, upstream),
    }
    rounds = interleaved(steps, SECONDS)
    fastest = min((name for name in rounds if "transformers" in name), key=lambda name: statistics.median(rounds[name]))
    with timed_parts(layer) as parts:
        profiled = interleaved({"step": steps["dropless"]}, 3)["step"]
    whole = statistics.median(profiled)
    table = Table("step", "median ms", "over dense")
    for name, times in rounds.items():
        table.add_row(name, f"{statistics.median(times):.1f}", f"{ratio(rounds, name, 'dense SwiGLU'):.2f}")
    console.print(table)
    console.print(f"{torch.get_num_threads()} threads, {len(rounds['dropless'])} rounds; fastest of theirs: {fastest}")
    console.print(f"batched_mm, forward alone, extrapolated from 16 tokens: {batched:.0f} ms")
    breakdown = {name: statistics.median(times) for name, times in parts.items()}
    console.print(
        "forward, ms:", {name: round(value, 2) for name, value in breakdown.items()}, f"of a step of {whole:.1f}"
    )
    ours_over_theirs = ratio(rounds, "dropless", fastest)
    figures = {
        "threads": torch.get_num_threads(),
        "rounds": len(rounds["dropless"]),
        "milliseconds": {name: statistics.median(times) for name, times in rounds.items()},
        "transformers": fastest,
        "capacity_over_dense": ratio(rounds, "capacity 1.25", "dense SwiGLU"),
        "capacity_over_transformers": ratio(rounds, "capacity 1.25", fastest),
        "forward_milliseconds": breakdown,
    }
    targets = {
        "over_dense": target(ratio(rounds, "dropless", "dense SwiGLU"), 1.3, at_most=True),
        "over_transformers": target(ours_over_theirs, 0.8, at_most=True),
        "growth_8_to_64": target(ratio(rounds, f"{MANY_EXPERTS} experts", "dropless"), 2, at_most=True),
        "statistics_share": target(breakdown["statistics"] / whole, 0.02, at_most=True),
    }
    print_result("moe_layer", figures, targets)


if __name__ == "__main__":
    main()
