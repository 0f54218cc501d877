"""Ranks candidates: which of the given texts fits this audio or image best.

Every held-out row of an audio+text or image+caption source is scored with each distinct text of the held-out rows
of its source (its own and a seeded choice of others where there are more than `MOST_CANDIDATES`). Three scores:

- ``sum``: ln p(text, end | audio), the probability that the model says this text and no more;
- ``mean``: the same per token, which does not prefer short texts;
- ``pmi``: ``sum`` minus ln p(text, end) without the audio, which does not prefer frequent texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmoe.data.load.decode import SampleLoader, StandIn
from mmoe.data.load.heldout import dealt
from mmoe.data.load.stream import make_collator
from mmoe.data.plan.measure import measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.evaluation.confidence import wilson_low
from mmoe.evaluation.inference import Inference
from mmoe.modalities.document import Document, DocumentBuilder
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import BUILT_IN, Modality
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run

MOST_CANDIDATES = 64
MOST_ROWS = 1000  # of a source: their seeded choice bounds what an evaluation takes
SCORES = ("sum", "mean", "pmi")


@dataclass(frozen=True)
class _Candidate:
    """A text to be scored: by itself, or after the audio or image of the row `ref`. `length` and `patches` are those
    of its document, known before anything is decoded."""

    ref: DocumentRef
    ids: np.ndarray
    alone: bool
    length: int
    patches: int


@dataclass(frozen=True)
class _Question:
    """A row and the numbers of the texts it is asked about, its own first; without its text its document has `length`
    positions."""

    ref: DocumentRef
    candidates: np.ndarray
    length: int
    patches: int

    def ask(self, texts: list[np.ndarray]) -> list[_Candidate]:
        """List the row's document with each of its candidates."""
        asked = [texts[number] for number in self.candidates]
        return [_Candidate(self.ref, ids, False, self.length + len(ids), self.patches) for ids in asked]


def rank_candidates(model: Inference, only: list[str], stand_in: StandIn | None = None) -> dict[str, dict[str, Any]]:
    """Return by source the number of `rows`, `chance`, and for each score `accuracy` with its 95 % Wilson bound `low`.

    A source without such rows, or with one text only, is not in the answer. Rows that do not fit a sequence with
    every candidate are left out and counted; of more than `MOST_ROWS` (or
    `evaluation.max_documents`) a seeded choice is asked about. All ranks ask;
    the figures are rank 0's, elsewhere each source's are empty.
    """
    run = model.run
    files, backend = run.sources.files("heldout"), run.config.data.video_backend
    decoder = SampleLoader(files, run.tokenizers, backend, stand_in, storage=run.sources.storage)
    reports = {}
    for number, name in enumerate(run.sources.names):
        if name not in only:
            continue
        questions, texts, left_out = _questions(run, decoder, number)
        if len(texts) > 1:
            reports[name] = _rank(model, decoder, questions, texts, left_out)
    return reports


def accuracies(scores: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Return the accuracy of each score by its name, with its bound, beside chance and the number of rows.

    `scores` has for each row those of its candidates, the right one first, which must be the single best.
    """
    rows = len(scores["sum"])
    right = {name: float(np.mean([s[0] > s[1:].max() for s in each])) for name, each in scores.items()}
    return {
        "rows": rows,
        "candidates": max(len(s) for s in scores["sum"]),
        "chance": float(np.mean([1 / len(s) for s in scores["sum"]])),
        "accuracy": right,
        "low": {name: wilson_low(share, rows) for name, share in right.items()},
    }


def _questions(run: Run, decoder: SampleLoader, source: int) -> tuple[list[_Question], list[np.ndarray], int]:
    """The rows that can be asked, the distinct texts (token ids) of their source, and how many rows do not fit a
    sequence with all they would be asked about."""
    start, room = decoder.tokenizers.vocabulary.ranges["text"].start, run.config.data.sequence_length
    rows: list[tuple[DocumentRef, int, int, int]] = []  # with the number of its text, and what the rest of it takes
    too_long = 0
    numbers: dict[tuple[int, ...], int] = {}  # of the distinct texts
    for shard in range(len(decoder.sources[source].tars)):
        index = decoder.index(source, shard)
        sizes = measure_index(index, decoder.tokenizers, decoder.sources[source].name)
        for row in range(len(index)):
            kinds, slices = index.row_segments(row)["modality"], index.row_segments(row)["slice"]
            text = (kinds == Modality.TEXT).sum()
            other = np.isin(kinds, (Modality.AUDIO, Modality.VISION)).any() or (kinds >= BUILT_IN).any()
            ids = index.row_text(row)
            if text != 1 or not other or not len(ids) or (slices >= 0).any():
                continue
            if len(ids) + 2 > room:
                too_long += 1
                continue
            number = numbers.setdefault(tuple(ids.tolist()), len(numbers))
            ref = DocumentRef(source, shard, row, 0, 0, 1, False, True)
            rows.append((ref, number, int(sizes.length[row]) - len(ids), int(sizes.count("patches")[row])))
    texts = [start + np.array(ids, np.int64) for ids in numbers]
    questions = []
    rng = np.random.default_rng((run.config.training.seed, source))
    most = min(MOST_ROWS, run.config.evaluation.max_documents or MOST_ROWS)
    if len(rows) > most:
        rows = [rows[number] for number in np.sort(rng.choice(len(rows), most, replace=False)).tolist()]
    for ref, own, rest, patches in rows if len(texts) > 1 else ():
        candidates = _candidates(own, len(texts), rng)
        if rest + max(len(texts[number]) for number in candidates) > room:
            too_long += 1
            continue
        questions.append(_Question(ref, candidates, rest, patches))
    return questions, texts, too_long


def _candidates(own: int, texts: int, rng: np.random.Generator) -> np.ndarray:
    others = np.delete(np.arange(texts), own)
    if texts > MOST_CANDIDATES:
        others = rng.choice(others, MOST_CANDIDATES - 1, replace=False)
    return np.r_[own, others]


def _rank(
    model: Inference, decoder: SampleLoader, questions: list[_Question], texts: list[np.ndarray], left_out: int
) -> dict[str, Any]:
    report = {"texts": len(texts), "left_out": left_out}
    if not questions:
        return report | {"rows": 0}
    alone = [_Candidate(questions[0].ref, ids, True, len(ids) + 2, 0) for ids in texts]
    asked = [candidate for question in questions for candidate in question.ask(texts)]
    name = decoder.sources[questions[0].ref.source].name
    found = score_texts(model, decoder, [*alone, *asked], f"ranking, {name}")
    if found is None:
        return {}
    totals, counts = found
    prior, at = totals[: len(texts)], len(texts)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for question in questions:
        here = slice(at, at + len(question.candidates))
        scores["sum"].append(totals[here])
        scores["mean"].append(totals[here] / counts[here])
        scores["pmi"].append(totals[here] - prior[question.candidates])
        at = here.stop
    return report | accuracies(scores)


def score_texts(
    model: Inference, decoder: SampleLoader, candidates: list[_Candidate], what: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return, for each candidate, ln p of its text and the closing token (summed), and how many tokens these are.

    They are on rank 0; elsewhere the answer is None. `what` names the measure for the progress.
    """
    vocabulary = model.run.tokenizers.vocabulary
    parts = {}
    for number, batch, hidden in model.outputs(_Batches(model.run, decoder, candidates), what):
        log_p, index = model.label_log_probabilities(hidden, batch)
        labels = batch.labels.flatten()[index].cpu().numpy()
        asked = (vocabulary.modality_of(labels) == Modality.TEXT) | (labels == Structure.EOS)
        flat, length = index.cpu().numpy()[asked], batch.shape[1]
        first = np.cumsum([0, *map(len, batch.documents)])
        document = first[flat // length] + batch.document.flatten().cpu().numpy()[flat]
        totals = np.bincount(document, log_p.double().cpu().numpy()[asked], first[-1])
        parts[number] = totals, np.bincount(document, minlength=first[-1])
    scored = model.in_order(parts)
    if not model.ranks.first:
        return None
    totals, counts = (np.concatenate(column) for column in zip(*scored))
    return totals, counts


class _Batches:
    """The documents of candidates in order, packed before they are decoded, in batches that replicas share."""

    def __init__(self, run: Run, decoder: SampleLoader, candidates: list[_Candidate]) -> None:
        self.decoder, self.size = decoder, run.config.training.heldout_sequences
        self._collate = make_collator(run.config.data, run.tokenizers, run.config.losses.ce.label_weights())
        data = run.config.data
        self.batches = list(_micro_batches(candidates, data.sequence_length, data.patch_budget, self.size))

    def __len__(self) -> int:
        return len(self.batches)

    def share(self, replica: int, replicas: int) -> Iterator[PackedBatch]:
        """Decode the batches of a replica."""
        nothing: list[_Candidate] = []
        for batch in dealt(self.batches, self.size, nothing, replica, replicas):
            sequences: list[list[tuple[DocumentRef, list[Document] | int]]] = [
                [(candidate.ref, [self._document(candidate)]) for candidate in sequence] for sequence in batch
            ]
            yield self._collate(sequences, groups=list(range(len(batch))))

    def _document(self, candidate: _Candidate) -> Document:
        if candidate.alone:
            return _alone(self.decoder, candidate.ids)
        return self.decoder(candidate.ref, text_ids=candidate.ids)[0]


def _micro_batches(
    candidates: list[_Candidate], length: int, patches: int, sequences: int
) -> Iterator[list[list[_Candidate]]]:
    """Candidates in order, as many to a sequence as fit, `sequences` sequences at a time."""
    batch: list[list[_Candidate]] = [[]]
    room, patch_room = length, patches
    for candidate in candidates:
        if candidate.length > room or candidate.patches > patch_room:
            if len(batch) == sequences:
                yield batch
                batch = []
            batch.append([])
            room, patch_room = length, patches
        batch[-1].append(candidate)
        room, patch_room = room - candidate.length, patch_room - candidate.patches
    if batch[0]:
        yield batch


def _alone(decoder: SampleLoader, ids: np.ndarray) -> Document:
    """The text as a document of its own."""
    builder = DocumentBuilder.from_tokenizers(decoder.tokenizers)
    builder.structure(Structure.BOS)
    builder.text(ids, pair=-1)
    builder.structure(Structure.EOS, predicted=True)
    return builder.finish()
