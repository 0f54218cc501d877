"""Candidate ranking, with a model that knows the answers and with one that does not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from mmoe.data.load.decode import SampleLoader
from mmoe.data.load.stream import make_collator
from mmoe.data.plan.planner import DocumentRef
from mmoe.evaluation.inference import inference
from mmoe.evaluation.ranking import _Candidate, _micro_batches, _questions, accuracies, rank_candidates, score_texts
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Structure


@dataclass
class Output:
    hidden: torch.Tensor


class Oracle(nn.Module):
    """After an audio clip or image it expects the row's own text (`right`) or the one before it; alone, nothing."""

    def __init__(self, run, right: bool):
        super().__init__()
        self.run, self.size = run, run.tokenizers.vocabulary.size
        texts = run.tokenizers.vocabulary.ranges["text"]
        self.text: dict[tuple[int, ...], np.ndarray] = {}
        decoder = SampleLoader(run.sources.files("heldout"), run.tokenizers, "pyav")
        for source in range(4):
            for shard in range(len(decoder.sources[source].tars)):
                index = decoder.index(source, shard)
                for row in range(len(index)):
                    self.text[source, shard, row] = texts.start + index.row_text(row)
        if not right:
            keys = sorted(self.text)
            self.text = dict(zip(keys, [self.text[keys[i - 1]] for i in range(len(keys))]))

    def forward(self, batch: PackedBatch) -> Output:
        sequence, position = np.indices(batch.shape)
        self.batch = batch
        return Output(torch.from_numpy(np.stack([sequence, position], axis=-1).astype(np.float32)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.size)
        for number, (sequence, position) in enumerate(hidden.long().tolist()):
            document = int(self.batch.document[sequence, position])
            if document < 0:
                continue
            mine = self.batch.document[sequence] == document
            first = int(torch.nonzero(mine)[0])
            if not (self.batch.modality[sequence][mine] > Modality.TEXT).any():
                continue
            until = self.batch.modality[sequence, first : position + 1]
            said = int((until == Modality.TEXT).sum())
            text = self.text[self.batch.documents[sequence][document][:3]]
            logits[number, text[said] if said < len(text) else int(Structure.EOS)] = 30.0
        return logits


def rank(run, oracle, *sources):
    with inference(replace(run, model=oracle)) as model:
        return rank_candidates(model, list(sources))


@pytest.mark.parametrize("source", ["audio", "image"])
def test_a_model_that_knows_the_texts_ranks_them_first(run, source):
    report = rank(run, Oracle(run, right=True), source)[source]
    assert report["accuracy"] == {"sum": 1.0, "mean": 1.0, "pmi": 1.0}
    assert (report["rows"], report["candidates"], report["texts"], report["left_out"]) == (10, 10, 10, 0)
    assert report["chance"] == pytest.approx(0.1)
    assert report["low"]["sum"] == pytest.approx(0.722, abs=1e-3)


def test_a_model_that_knows_them_wrongly_never_does(run):
    reports = rank(run, Oracle(run, right=False), "audio", "text", "clip")
    assert list(reports) == ["audio"]  # text has nothing to fit, and the captions of clips stand inside slices
    assert reports["audio"]["accuracy"]["sum"] == 0.0


def test_a_candidate_must_win_alone():
    scores = [np.array([1.0, 1.0]), np.array([2.0, 1.0]), np.array([0.0, 1.0]), np.array([3.0, 1.0, 2.0])]
    report = accuracies({"sum": scores})
    assert report["accuracy"] == {"sum": 0.5}
    assert report["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4)


def candidates(run, refs):
    """The rows with their own texts, and their documents."""
    decoder = SampleLoader(run.sources.files("heldout"), run.tokenizers, "pyav")
    start = run.tokenizers.vocabulary.ranges["text"].start
    documents = [decoder(ref)[0] for ref in refs]
    made = [
        _Candidate(ref, start + decoder.index(ref.source, ref.shard).row_text(ref.row), False, len(document), patches)
        for ref, document in zip(refs, documents)
        for patches in [len(document.values[Modality.VISION][1]) if Modality.VISION in document.values else 0]
    ]
    return decoder, made, documents


def test_scores_are_those_of_each_document_alone(run):
    """Packing many candidates into a sequence changes nothing, and only the text and its end are counted."""
    refs = [DocumentRef(source, 0, row, 0, 0, 1, False, True) for source in (1, 2) for row in range(5)]
    decoder, asked, documents = candidates(run, refs)
    with inference(run) as model:
        together, counts = score_texts(model, decoder, asked, "test")
        alone = [score_texts(model, decoder, [item], "test")[0][0] for item in asked]
        hidden = []
        for ref, document in zip(refs, documents):
            collate = make_single(run, len(document))
            batch = collate([[(ref, [document])]], groups=[0])
            p = run.model.logits(run.model(batch).hidden[0]).log_softmax(1)
            at = np.flatnonzero(document.modality == Modality.TEXT)
            targets = np.r_[document.token_ids[at], Structure.EOS]
            hidden.append(p[np.r_[at - 1, at[-1]], targets].sum().item())
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(together, hidden, rtol=1e-5)
    assert counts.tolist() == [(d.modality == Modality.TEXT).sum() + 1 for d in documents]


@pytest.mark.parametrize("source", ["audio", "image"])
def test_what_a_candidate_takes_is_known_before_it_is_decoded(run, source):
    decoder = SampleLoader(run.sources.files("heldout"), run.tokenizers, "pyav")
    questions, texts, _ = _questions(run, decoder, run.sources.names.index(source))
    for question in questions[:3]:
        for candidate in question.ask(texts):
            (document,) = decoder(candidate.ref, text_ids=candidate.ids)
            assert candidate.length == len(document)
            patches = len(document.values[Modality.VISION][1]) if Modality.VISION in document.values else 0
            assert candidate.patches == patches


def make_single(run, length: int):
    data = run.config.data.model_copy(update={"sequence_length": length})
    return make_collator(data, run.tokenizers, run.config.losses.ce.label_weights())


def test_rows_that_fit_no_sequence_are_counted(run):
    longest = {"sequence_length": 40}
    view = replace(run, config=run.config.model_copy(update={"data": run.config.data.model_copy(update=longest)}))
    report = rank(view, Oracle(view, right=True), "audio")["audio"]
    assert report["left_out"] > 0
    assert report["rows"] + report["left_out"] == 10


def test_micro_batches_keep_the_order_and_the_room(run):
    _, asked, _ = candidates(run, [DocumentRef(1, 0, row, 0, 0, 1, False, True) for row in range(7)])
    batches = list(_micro_batches(asked, length=60, patches=14, sequences=2))
    flat = [item for batch in batches for sequence in batch for item in sequence]
    assert [item.ref for item in flat] == [item.ref for item in asked]
    for batch in batches:
        assert 1 <= len(batch) <= 2
        for sequence in batch:
            assert 0 < sum(item.length for item in sequence) <= 60
            assert sum(item.patches for item in sequence) <= 14
