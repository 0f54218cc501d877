"""Gating noise: Gaussian, of each token its own, and the same wherever and whenever the token is routed."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmoe.models.moe.layer import MoEConfig, MoELayer
from mmoe.models.moe.noise import gaussian, token_keys
from mmoe.models.moe.tokens import Tokens
from tests.models.random_batch import pack, random_batch

NOISY = MoEConfig(n_experts=8, top_k=2, intermediate_size=16, router_noise=1.0)


def reference(key: int, experts: int, stream: int) -> list[int]:
    """splitmix64 in Python's integers, of which the noise takes the upper 24 bits."""
    mask = (1 << 64) - 1

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    word = mixed((key ^ stream) & mask)
    return [mixed((word + 0x9E3779B97F4A7C15 * e) & mask) >> 40 for e in range(1, experts + 1)]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.integers(0, 100))
def test_it_is_splitmix64_through_the_inverse_of_the_normal_distribution(key, seed, layer):
    stream = int(np.random.SeedSequence((seed, layer)).generate_state(1, np.uint64)[0])
    noise = gaussian(torch.tensor([key]), 5, seed, layer)[0]
    for value, bits in zip(noise.tolist(), reference(key, 5, stream), strict=True):
        assert value == pytest.approx(NormalDist().inv_cdf((bits + 0.5) / 2**24), rel=1e-5, abs=1e-7)


def test_it_is_gaussian_and_independent_of_every_neighbor():
    ids = torch.randint(5, (4, 5000), generator=torch.Generator().manual_seed(0))  # few ids: keys must not follow them
    key_T = token_keys(ids).flatten()
    assert len(key_T.unique()) == len(key_T)
    noise = gaussian(key_T, 8, seed=3, layer=1)
    value, rank = noise.double().flatten().sort().values, torch.arange(noise.numel())
    distance = (torch.special.ndtr(value) - (rank + 0.5) / noise.numel()).abs().max()
    assert distance < 1.95 / noise.numel() ** 0.5  # Kolmogorov-Smirnov, one seed in a thousand
    others = {
        "expert": noise.roll(1, 1),
        "token": noise.roll(1, 0),
        "sequence": noise.roll(5000, 0),
        "layer": gaussian(key_T, 8, seed=3, layer=2),
        "seed": gaussian(key_T, 8, seed=4, layer=1),
    }
    for name, other in others.items():
        correlation = float((noise * other).mean())
        assert abs(correlation) < 5 / noise.numel() ** 0.5, name


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_a_token_has_its_noise_in_every_batch_that_its_sequence_is_part_of(seed):
    """Other micro-batches, another order: the noise of sequence b is that of b alone."""
    ids = torch.randint(100, (5, 12), generator=torch.Generator().manual_seed(seed))
    whole = token_keys(ids)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(token_keys(ids[order]), whole[order])
    assert all(torch.equal(token_keys(ids[b : b + 1])[0], whole[b]) for b in range(5))


def test_padding_has_no_noise_and_the_tokens_keep_theirs():
    batch = random_batch(0)
    tokens = Tokens.from_batch(batch)
    assert torch.equal(tokens.key_T, token_keys(batch.token_ids)[batch.valid])
    assert Tokens.from_batch(pack([[], []], length=8)).key_T.shape == (0,)


def routed(layer: MoELayer, x, tokens) -> torch.Tensor:
    chosen = []
    hook = layer.router.register_forward_hook(lambda module, args, out: chosen.append(out.expert_TK))
    layer(x, tokens)
    hook.remove()
    return chosen[0]


def test_a_layer_has_noise_in_training_alone_and_another_one_in_every_step_and_layer():
    torch.manual_seed(0)
    batch = random_batch(1)
    tokens, x = Tokens.from_batch(batch), torch.randn(*batch.shape, 16)
    layer, second = MoELayer(16, NOISY, 0), MoELayer(16, NOISY, 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict(layer.state_dict())
    torch.manual_seed(5)
    choice = routed(layer, x, tokens)
    state = torch.get_rng_state()
    assert torch.equal(routed(layer, x, tokens), choice) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(routed(second, x, tokens), choice)
    torch.manual_seed(6)
    assert not torch.equal(routed(layer, x, tokens), choice)
    clean = routed(layer.eval(), x, tokens)
    assert not torch.equal(clean, choice)
    assert torch.equal(clean, routed(second.eval(), x, tokens))


def test_recomputation_has_the_same_noise():
    torch.manual_seed(0)
    batch = random_batch(2)
    tokens, x = Tokens.from_batch(batch), torch.randn(*batch.shape, 16, requires_grad=True)
    layer = MoELayer(16, NOISY)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    chosen = []
    layer.router.register_forward_hook(lambda module, args, out: chosen.append(out.expert_TK))
    torch.manual_seed(1)
    layer(x, tokens)[0].sum().backward()
    gradient = layer.router.weight.grad.clone()
    layer.zero_grad()
    with set_checkpoint_early_stop(False):  # else the second forward pass ends before the hook
        checkpoint(lambda y: layer(y, tokens)[0], x, use_reentrant=False).sum().backward()
    assert len(chosen) == 3 and all(torch.equal(chosen[0], other) for other in chosen[1:])
    assert torch.equal(layer.router.weight.grad, gradient) and gradient.any()
