"""Decides which samples are left out as duplicates: in one process, in order, from signatures alone.

A held-out sample goes where an earlier held-out one is equal, or where another source trains on it. A training sample
goes where a held-out one (of this or another source) has its content or nearly so, or where an earlier training sample
(of another source, or before it in this one) is equal or nearly so. So the first in order stays.

Memory is that of the signatures: measured, 0.1 KB a sample for exact duplicates, 6.4 KB a text and 0.7 KB an image for
near ones, in 2, 180 and 80 us. So ten million texts take 64 GB and half an hour; more are prepared in parts, each
against those before it. Texts are found through the bands of `datasketch.MinHashLSH`, images through four bands of
16 bits.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mmoe.optional import require
from mmoe.preparation.signatures import DedupConfig, Signatures, empty_minhash

_BANDS, _BAND_BITS = 4, 16


@dataclass(frozen=True)
class Duplicate:
    """Names a sample to leave out: its `row` among the signatures, the class it counts under, what it duplicates."""

    row: int
    reason: str
    of: str


class Duplicates:
    """Learns of samples in order and says which of them are duplicates.

    `reference` takes the samples of other sources, `judge` those of this one: all held-out ones first.
    """

    def __init__(self, config: DedupConfig) -> None:
        self._heldout: dict[int, str] = {}  # content hash -> whose; of this and other sources
        self._foreign: dict[int, str] = {}  # content hash of what other sources train on -> whose
        self._samples: dict[str, dict[int, str]] = {"heldout": {}, "train": {}}  # sample hash -> the first
        self._near = {side: _Near(config) for side in self._samples} if config.near else {}

    def reference(self, side: str, signatures: Signatures, labels: Sequence[str], recordings: Sequence[str]) -> None:
        """Remember the samples of another source, which those of this source must not duplicate.

        `side` is the side of the other source's split that they are on, `labels` are what they are called in messages,
        `recordings` the recordings they come from.
        """
        contents = self._heldout if side == "heldout" else self._foreign
        for row, (content, sample) in enumerate(zip(signatures.content.tolist(), signatures.sample.tolist())):
            contents.setdefault(content, labels[row])
            if side == "train":
                self._samples["train"].setdefault(sample, labels[row])
        if self._near:
            queries = _queries(signatures)
            for row, label in enumerate(labels):
                self._near[side].add(queries[row], label, recordings[row])

    def judge(
        self, side: str, signatures: Signatures, labels: Sequence[str], recordings: Sequence[str]
    ) -> Iterator[Duplicate]:
        """Yield the duplicates among the next samples of this source's `side`, and remember the other samples.

        `labels` are what the samples are called in messages, `recordings` the recordings they come from.
        """
        earlier, heldout = self._samples[side], side == "heldout"
        queries = _queries(signatures)
        for row, (content, sample) in enumerate(zip(signatures.content.tolist(), signatures.sample.tolist())):
            contents = self._foreign if heldout else self._heldout
            if content in contents:
                yield Duplicate(row, _OTHER_SIDE[side], contents[content])
            elif sample in earlier:
                yield Duplicate(row, "duplicate of an earlier sample", earlier[sample])
            elif found := self._near_duplicate(side, queries[row], recordings[row]):
                yield Duplicate(row, *found)
            else:
                earlier[sample] = labels[row]
                if heldout:
                    self._heldout.setdefault(content, labels[row])
                if self._near:
                    self._near[side].add(queries[row], labels[row], recordings[row])

    def _near_duplicate(self, side: str, query: "_Query", recording: str) -> tuple[str, str] | None:
        if not self._near:
            return None
        if of := self._near["train" if side == "heldout" else "heldout"].find(query, recording):
            return f"near {_OTHER_SIDE[side]}", of
        if side == "train" and (of := self._near["train"].find(query, recording)):
            return "near duplicate of an earlier sample", of
        return None


_OTHER_SIDE = {
    "train": "duplicate of a held-out sample",
    "heldout": "duplicate of another source's training sample",
}


@dataclass
class _Query:
    """What is compared of one sample: the signature of its text, or the hashes of its images."""

    text: np.ndarray | None
    images: list[int]


def _queries(signatures: Signatures) -> list[_Query]:
    queries = [_Query(None, []) for _ in signatures.item]
    for row, text in zip(signatures.text_row.tolist(), signatures.text):
        queries[row].text = text
    for row, image in zip(signatures.image_row.tolist(), signatures.image.tolist()):
        queries[row].images.append(image)
    return queries


class _Near:
    """The texts and images of the samples kept so far, found again by likeness."""

    def __init__(self, config: DedupConfig) -> None:
        self._similarity, self._empty = config.text_similarity, empty_minhash(config.permutations)
        library = require("datasketch", "prepare.dedup.near")
        # A candidate too many costs one comparison, one too few is a duplicate not found.
        self._texts = library.MinHashLSH(config.text_similarity, config.permutations, weights=(0.2, 0.8))
        self._signatures: list[np.ndarray] = []
        self._labels: list[str] = []
        self._images = ImageIndex(config.image_bits)
        self._owners: list[tuple[str, str]] = []  # of every image: label and recording

    def add(self, query: _Query, label: str, recording: str) -> None:
        if query.text is not None:
            self._texts.insert(len(self._labels), self._minhash(query.text), check_duplication=False)
            self._labels.append(label)
            self._signatures.append(query.text)
        for image in query.images:
            self._images.add(image)
            self._owners.append((label, recording))

    def find(self, query: _Query, recording: str) -> str:
        """Whom the sample nearly duplicates, or ""; a sample with several images does when each is known.

        Images of one recording are not compared with each other: they are one image said in several ways.
        """
        if query.text is not None:
            candidates = sorted(self._texts.query(self._minhash(query.text)))
            likeness = [float(np.mean(self._signatures[candidate] == query.text)) for candidate in candidates]
            best = int(np.argmax(likeness)) if candidates else 0
            return self._labels[candidates[best]] if candidates and likeness[best] >= self._similarity else ""
        found = [self._image(image, recording) for image in query.images]
        return found[0] if found and all(found) else ""

    def _image(self, image: int, recording: str) -> str:
        labels = ((*self._owners[i], i) for i in self._images.near(image))
        return next((label for label, other, _ in labels if other != recording), "")

    def _minhash(self, signature: np.ndarray) -> Any:
        minhash = self._empty.copy()
        minhash.hashvalues = signature
        return minhash


class ImageIndex:
    """Finds 64-bit hashes of images again within `bits` of Hamming distance.

    Of four bands of 16 bits, one differs in at most a quarter of `bits` (rounded down): the buckets of all values so
    near are looked up for each band. That is 4 buckets for up to 3 bits, 68 for up to 7, 548 for up to 11, and with
    evenly spread hashes n / 65,536 comparisons a bucket.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._hashes: list[int] = []
        self._buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
        radius = bits // _BANDS
        self._flips = [
            sum(1 << bit for bit in chosen)
            for size in range(radius + 1)
            for chosen in combinations(range(_BAND_BITS), size)
        ]

    def add(self, image: int) -> None:
        """Keep a hash; its number is how many were kept before."""
        for bucket, value in zip(self._buckets, _bands(image)):
            bucket[value].append(len(self._hashes))
        self._hashes.append(image)

    def near(self, image: int) -> list[int]:
        """Return the numbers of the hashes within the distance: nearest first, equally near ones as they were added."""
        candidates = {
            number
            for bucket, value in zip(self._buckets, _bands(image))
            for flip in self._flips
            for number in bucket.get(value ^ flip, ())
        }
        distances = sorted(((self._hashes[number] ^ image).bit_count(), number) for number in candidates)
        return [number for distance, number in distances if distance <= self._bits]


def _bands(image: int) -> list[int]:
    return [image >> (_BAND_BITS * band) & 0xFFFF for band in range(_BANDS)]
