"""Tells samples alike without their content: by exact hashes always, by signatures of texts and images on demand.

- A *content hash* is of what was sensed (`rows.content_hash`), a *sample hash* of that and of what is said of it.
- A text (of a sample that is nothing but text) has a MinHash over its runs of characters, after NFKC, case folding and
  joining of white space. Two signatures agree in about the share of runs that the texts have in common.
- A still image (outside time slices: neighboring frames of a camera are alike by nature) has a perceptual hash of
  64 bits, which scaling and recompression change in few bits. An image of a single tone has none.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from mmoe.config.base import Address, Config
from mmoe.data.load.video import is_video
from mmoe.hashing import hash64, rolling_hashes
from mmoe.optional import needs, require
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_SLICE

_SEED = 1  # of the permutations: signatures are only compared within one preparation
_SINGLE_TONE = 2.0  # grey levels of standard deviation, below which a perceptual hash is of noise


class DedupConfig(Config):
    """Says which samples count as duplicates, and of which sources.

    `against` are prepared sources whose samples are not to occur again, nor their held-out ones in training.
    """

    against: tuple[Address, ...] = ()  # prepared sources whose samples are not to occur again
    near: bool = False  # also near duplicates; exact ones always
    text_similarity: float = Field(0.7, gt=0, lt=1)  # of the runs of characters of both texts, the share common to both
    shingle: int = Field(8, ge=1)  # characters a run; short runs make all texts of few words alike
    permutations: int = Field(128, ge=16)  # numbers a signature: the similarity is estimated to 1 / sqrt of it
    image_bits: int = Field(6, ge=0, le=11)  # most bits of 64 in which perceptual hashes of one image differ

    def check(self) -> None:
        """Raise PackageError where a package that the config needs is not there."""
        if self.near:
            require("datasketch", "prepare.dedup.near")
            require("imagehash", "prepare.dedup.near")


@dataclass(frozen=True)
class Signatures:
    """Holds the hashes and signatures of n samples.

    `item` says which item each sample is; texts and images point to their place among the n.
    """

    item: np.ndarray  # i64 [n]
    content: np.ndarray  # i64 [n]
    sample: np.ndarray  # i64 [n]
    text_row: np.ndarray  # i64 [t]
    text: np.ndarray  # u32 [t, permutations]
    image_row: np.ndarray  # i64 [p]
    image: np.ndarray  # u64 [p]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as they are stored."""
        return dict(vars(self))


class SignatureBuilder:
    """Collects the signatures of samples one by one; `build` returns those of all."""

    def __init__(self, config: DedupConfig) -> None:
        self.config = config
        self._item: list[int] = []
        self._content: list[int] = []
        self._sample: list[int] = []
        self._texts: list[tuple[int, np.ndarray]] = []
        self._images: list[tuple[int, int]] = []

    def add(
        self,
        item: int,
        content_hash: int,
        segments: np.ndarray,
        members: Sequence[str],
        texts: Callable[[], Sequence[str]],
        read: Callable[[str], bytes],
    ) -> None:
        """Add the signatures of one sample.

        `segments` are its index fields, `members` the names that they number; `texts` gives its texts, `read` the bytes
        of a member.
        """
        row = len(self._item)
        self._item.append(item)
        self._content.append(content_hash)
        self._sample.append(sample_hash(content_hash, segments))
        if not self.config.near:
            return
        kinds = segments["modality"]
        if (kinds == Modality.TEXT).all():
            signature = text_signature("\n".join(texts()), self.config.shingle, self.config.permutations)
            if signature is not None:
                self._texts.append((row, signature))
        stills = segments["member"][(kinds == Modality.VISION) & (segments["slice"] == NO_SLICE)]
        for name in dict.fromkeys(members[number] for number in stills.tolist()):
            if not is_video(name) and (found := image_hash(read(name), name)) is not None:
                self._images.append((row, found))

    def build(self) -> Signatures:
        """Stack the signatures of all samples so far."""
        text = [signature for _, signature in self._texts]
        return Signatures(
            item=np.array(self._item, np.int64),
            content=np.array(self._content, np.int64),
            sample=np.array(self._sample, np.int64),
            text_row=np.array([row for row, _ in self._texts], np.int64),
            text=np.stack(text) if text else np.zeros((0, self.config.permutations), np.uint32),
            image_row=np.array([row for row, _ in self._images], np.int64),
            image=np.array([found for _, found in self._images], np.uint64),
        )


def sample_hash(content_hash: int, segments: np.ndarray) -> int:
    """Hash a sample's content and its texts in order, from the fields of the index."""
    texts = segments["text_hash"][segments["modality"] == Modality.TEXT]
    return hash64(content_hash.to_bytes(8, "little", signed=True), np.ascontiguousarray(texts, "<i8").tobytes())


def text_signature(text: str, shingle: int, permutations: int) -> np.ndarray | None:
    """Compute the MinHash [permutations] of the runs of `shingle` characters; None for a text of fewer characters."""
    runs = shingles(text, shingle)
    if not len(runs):
        return None
    minhash = empty_minhash(permutations).copy()
    minhash.update_batch(runs.tolist())
    return minhash.hashvalues


def shingles(text: str, length: int) -> np.ndarray:
    """Hash the runs of `length` characters of the normalized text: distinct 32-bit hashes, u32 in rising order."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < length:
        return np.zeros(0, np.uint32)
    return np.unique(rolling_hashes(codes, length))


@lru_cache(maxsize=4)
def empty_minhash(permutations: int) -> Any:
    """Return a datasketch MinHash of integers, to be copied: to draw the permutations takes longer than a text."""
    return require("datasketch", "prepare.dedup.near").MinHash(permutations, seed=_SEED, hashfunc=int)


def image_hash(data: bytes, where: str) -> int | None:
    """Compute the perceptual hash of an image file, 64 bits; None for an image of a single tone.

    `where` names the file in messages.
    """
    library = require("imagehash", "prepare.dedup.near")
    with needs("decoding images"):
        from PIL import Image

        from mmoe.data.load.media import load_image
    image = Image.fromarray(load_image(data, where))
    if np.asarray(image.convert("L").resize((32, 32))).std() < _SINGLE_TONE:
        return None
    return int(str(library.phash(image)), 16)
