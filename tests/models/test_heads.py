import pytest
import torch
import torch.nn.functional as F

from mmoe.models.heads import ActionHead, ContrastHead
from tests.models.random_batch import random_batch


def test_pairs_are_pooled_over_their_own_tokens_projected_and_normalized():
    batch = random_batch(0, documents=6)
    head = ContrastHead(16, 8).double()
    hidden = torch.randn(*batch.shape, 16, dtype=torch.float64)
    sides = head(hidden, batch.pairs, batch.modality)
    assert len(batch.pairs.group) >= 3
    flat, modality = hidden.flatten(0, 1), batch.modality.flatten()
    for p, side in ((p, side) for p in range(len(batch.pairs.group)) for side in range(2)):
        start, stop = batch.pairs.span[p, side].tolist()
        kind = batch.pairs.modality[p, side]
        own = [flat[at] for at in range(start, stop) if modality[at] == kind]
        names = {1: "text", 2: "vision", 3: "audio"}
        expected = F.normalize(head.projections[names[int(kind)]](torch.stack(own).mean(0)), dim=0)
        torch.testing.assert_close(sides[side][p], expected)


def test_no_pairs_and_no_actions_are_no_trouble():
    batch = random_batch(0)
    none = type(batch.pairs)(*(getattr(batch.pairs, name)[:0] for name in ("span", "modality", "text_hash", "group")))
    hidden = torch.randn(*batch.shape, 16, requires_grad=True)
    left, right = ContrastHead(16, 8)(hidden, none, batch.modality)
    assert left.shape == right.shape == (0, 8)
    assert ActionHead(16, 3, 2)(hidden.flatten(0, 1)[:0]).shape == (0, 3, 2)


@pytest.mark.parametrize("head", [ActionHead(16, 3, 2), ContrastHead(16, 8)], ids=["action", "contrast"])
def test_heads_stay_wide_under_autocast(head):
    batch = random_batch(0)
    hidden = torch.randn(*batch.shape, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(head, ActionHead):
            assert head(hidden[0]).dtype is torch.float32
        else:
            assert all(x.dtype is torch.float32 for x in head(hidden, batch.pairs, batch.modality))
