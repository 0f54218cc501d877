"""Candidate ranking: which of the given texts fits this sound or picture best.

Every held-out row of an audio+text or image+caption source is scored with each distinct text of the held-out rows
of its source (its own and a seeded choice of others where there are more than `MOST_CANDIDATES`). Three scores:

- ``sum``: ln p(text, end | sound), the probability that the model says this text and no more;
- ``mean``: the same per token, which does not prefer short texts;
- ``pmi``: ``sum`` minus ln p(text, end) without the sound, which does not prefer frequent texts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmoe.data.load.decode import Decoder, StandIn
from mmoe.data.load.document import Document, DocumentBuilder
from mmoe.data.load.stream import make_collator
from mmoe.data.plan.planner import DocumentRef
from mmoe.evaluation.bounds import wilson_low
from mmoe.evaluation.inference import label_log_probabilities
from mmoe.models.decoder import MultimodalModel
from mmoe.schema.sample import Modality
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run

MOST_CANDIDATES = 64
SCORES = ("sum", "mean", "pmi")


@dataclass(frozen=True)
class _Question:
    """A row and the numbers of the texts it is asked about, its own first."""

    ref: DocumentRef
    candidates: np.ndarray


def rank_candidates(
    run: Run, model: MultimodalModel, only: list[str], stand_in: StandIn | None = None
) -> dict[str, dict[str, Any]]:
    """By source: number of `rows`, `chance`, and `accuracy` with its 95 % Wilson bound `low` for each score.

    A source without such rows, or with one text only, is not in the answer. Rows that do not fit a sequence with
    every candidate are left out and counted.
    """
    decoder = Decoder(
        run.sources.files("heldout"), run.tokenizers, run.config.data.video_backend, stand_in, frozenset()
    )
    reports = {}
    for number, name in enumerate(run.sources.names):
        if name not in only:
            continue
        refs, own, texts, too_long = _rows(decoder, number, run.config.data.sequence_length)
        if len(texts) < 2:
            continue
        rng = np.random.default_rng((run.config.training.seed, number))
        questions = [_question(ref, mine, len(texts), rng) for ref, mine in zip(refs, own)]
        reports[name] = _rank(run, model, decoder, questions, texts, too_long)
    return reports


def accuracies(scores: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """`scores` by name: for each row those of its candidates, the right one first, which must be the single best."""
    rows = len(scores["sum"])
    right = {name: float(np.mean([s[0] > s[1:].max() for s in each])) for name, each in scores.items()}
    return {
        "rows": rows,
        "candidates": max(len(s) for s in scores["sum"]),
        "chance": float(np.mean([1 / len(s) for s in scores["sum"]])),
        "accuracy": right,
        "low": {name: wilson_low(share, rows) for name, share in right.items()},
    }


def _rows(decoder: Decoder, source: int, room: int) -> tuple[list[DocumentRef], list[int], list[np.ndarray], int]:
    """The rows that can be asked, the number of each one's own text, the distinct texts (token ids), and how many
    rows have a text that fits no sequence of `room` positions."""
    start = decoder.tokenizers.vocabulary.ranges["text"].start
    refs, own, too_long = [], [], 0
    numbers: dict[tuple[int, ...], int] = {}  # of the distinct texts
    for shard in range(len(decoder.sources[source].tars)):
        index = decoder.index(source, shard)
        for row in range(len(index)):
            kinds, slices = index.row_segments(row)["modality"], index.row_segments(row)["slice"]
            text = (kinds == Modality.TEXT).sum()
            other = ((kinds == Modality.AUDIO) | (kinds == Modality.VISION)).any()
            ids = index.row_text(row)
            if text != 1 or not other or not len(ids) or (slices >= 0).any():
                continue
            if len(ids) + 2 > room:
                too_long += 1
                continue
            refs.append(DocumentRef(source, shard, row, 0, 0, 1, False, True))
            own.append(numbers.setdefault(tuple(ids.tolist()), len(numbers)))
    return refs, own, [start + np.array(ids, np.int64) for ids in numbers], too_long


def _question(ref: DocumentRef, own: int, texts: int, rng: np.random.Generator) -> _Question:
    others = np.delete(np.arange(texts), own)
    if texts > MOST_CANDIDATES:
        others = rng.choice(others, MOST_CANDIDATES - 1, replace=False)
    return _Question(ref, np.r_[own, others])


def _rank(
    run: Run,
    model: MultimodalModel,
    decoder: Decoder,
    questions: list[_Question],
    texts: list[np.ndarray],
    left_out: int,
) -> dict[str, Any]:
    room = run.config.data.sequence_length
    kept: list[_Question] = []

    def documents() -> Iterator[tuple[DocumentRef, Document]]:
        nonlocal left_out
        for ids in texts:
            yield questions[0].ref, _alone(decoder, ids)
        for question in questions:
            asked = [decoder(question.ref, text_ids=texts[number])[0] for number in question.candidates]
            if max(map(len, asked)) > room:
                left_out += 1
                continue
            kept.append(question)
            yield from ((question.ref, document) for document in asked)

    totals, counts = score_texts(run, model, documents())
    prior, at = totals[: len(texts)], len(texts)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for question in kept:
        here = slice(at, at + len(question.candidates))
        scores["sum"].append(totals[here])
        scores["mean"].append(totals[here] / counts[here])
        scores["pmi"].append(totals[here] - prior[question.candidates])
        at = here.stop
    report = {"texts": len(texts), "left_out": left_out}
    return report | accuracies(scores) if kept else report | {"rows": 0}


def score_texts(
    run: Run, model: MultimodalModel, documents: Iterable[tuple[DocumentRef, Document]]
) -> tuple[np.ndarray, np.ndarray]:
    """For each document ln p of its text and the closing token (summed), and how many tokens these are."""
    data = run.config.data
    collate = make_collator(data, run.tokenizers, run.config.losses.label_weights())
    vocabulary = run.tokenizers.vocabulary
    totals, counts = [], []
    for sequences in _micro_batches(
        documents, data.sequence_length, data.patch_budget, run.config.training.heldout_sequences
    ):
        batch = collate(sequences, groups=list(range(len(sequences)))).to(run.device)
        chunk = run.config.losses.ce.chunk
        scores, index = label_log_probabilities(model, model(batch).hidden, batch, chunk)
        labels = batch.labels.flatten()[index].cpu().numpy()
        asked = (vocabulary.modality_of(labels) == Modality.TEXT) | (labels == Structure.EOS)
        flat, length = index.cpu().numpy()[asked], batch.shape[1]
        first = np.cumsum([0, *(len(sequence) for sequence in sequences)])
        document = first[flat // length] + batch.document.flatten().cpu().numpy()[flat]
        totals.append(np.bincount(document, scores.double().cpu().numpy()[asked], first[-1]))
        counts.append(np.bincount(document, minlength=first[-1]))
    return np.concatenate([*totals, np.zeros(0)]), np.concatenate([*counts, np.zeros(0, np.int64)])


def _micro_batches(
    documents: Iterable[tuple[DocumentRef, Document]], length: int, patches: int, sequences: int
) -> Iterator[list[list[tuple[DocumentRef, list[Document] | int]]]]:
    """Documents in order, as many to a sequence as fit, `sequences` sequences at a time."""
    batch: list[list[tuple[DocumentRef, list[Document] | int]]] = [[]]
    room, patch_room = length, patches
    for ref, document in documents:
        size = len(document)
        need = len(document.values[Modality.VISION][1]) if Modality.VISION in document.values else 0
        if size > room or need > patch_room:
            if len(batch) == sequences:
                yield batch
                batch = []
            batch.append([])
            room, patch_room = length, patches
        batch[-1].append((ref, [document]))
        room, patch_room = room - size, patch_room - need
    if batch[0]:
        yield batch


def _alone(decoder: Decoder, ids: np.ndarray) -> Document:
    """The text as a document of its own."""
    tokenizers = decoder.tokenizers
    builder = DocumentBuilder(tokenizers.config.action.chunk, tokenizers.dims[Modality.ACTION].size)
    builder.structure(Structure.BOS)
    builder.text(ids, pair=-1)
    builder.structure(Structure.EOS, predicted=True)
    return builder.finish()
