"""Unigram entropy and held-out cross-entropy, against direct computations."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.evaluation.cross_entropy import TokenScores, unigram_entropy
from mmoe.evaluation.inference import inference, label_log_probabilities
from mmoe.schema.modality import Modality


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=200))
def test_unigram_entropy_is_the_least_mean_surprise_without_context(tokens):
    counts = Counter(tokens)
    surprise = [-math.log(counts[token] / len(tokens)) for token in tokens]
    assert unigram_entropy(np.bincount(tokens)) == pytest.approx(sum(surprise) / len(tokens), abs=1e-9)


def test_ce_is_that_of_the_whole_logits_by_source_and_modality(run):
    scores = TokenScores(run.tokenizers.vocabulary, run.sources.names)
    nll, labels, sources = [], [], []
    with inference(run) as model:
        for _, batch, hidden in model.outputs(run.heldout(isolated=False), "test"):
            scores.add(batch, *label_log_probabilities(run.model, hidden, batch, chunk=7))
            flat = batch.labels.flatten()
            each = F.cross_entropy(run.model.logits(hidden.flatten(0, 1)), flat, ignore_index=-100, reduction="none")
            nll.append(each[flat >= 0])
            labels.append(flat[flat >= 0])
            sources.append(batch.source.flatten()[flat >= 0])
    nll, labels, sources = torch.cat(nll), torch.cat(labels).numpy(), torch.cat(sources).numpy()
    report = scores.report()
    kinds = run.tokenizers.vocabulary.modality_of(labels)
    for number, name in enumerate(run.sources.names):
        for kind, entry in report["ce_by_source"][name].items():
            mine = (kinds == Modality.named(kind.upper())) & (sources == number)
            assert entry["ce"] == pytest.approx(nll[torch.from_numpy(mine)].mean().item(), rel=1e-5)
            assert entry["unigram"] == pytest.approx(unigram_entropy(np.bincount(labels[mine])))
            assert entry["labels"] == mine.sum()
    assert sum(report["labels"].values()) == len(labels)
    mine = kinds == Modality.TEXT
    assert report["val_ce"]["text"] == pytest.approx(nll[torch.from_numpy(mine)].mean().item(), rel=1e-5)
    assert report["unigram_ce"]["text"] == pytest.approx(unigram_entropy(np.bincount(labels[mine])))
    assert set(report["val_ce"]) == {"text", "audio", "structure"}


def test_measuring_leaves_the_model_in_the_mode_it_was_in(run):
    run.model.train()
    with inference(run):
        assert not run.model.training
        assert not torch.is_grad_enabled()
    assert run.model.training
