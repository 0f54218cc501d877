"""Text to ids: byte-level BPE, lossless for any string that UTF-8 can hold."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mmoe.config.base import Address, Config
from mmoe.config.nature import Nature
from mmoe.errors import DataError, MissingFileError
from mmoe.files import Read, read_file
from mmoe.hashing import canonical_json
from mmoe.tokenizers.probes import probe_loss

BYTE_TOKENS = 256


def _byte_symbols() -> list[str]:
    """The character that byte-level BPE writes for each byte 0..255.

    Printable Latin-1 characters stand for themselves, the others for U+0100, U+0101, ... in order, so that no
    symbol is white space (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTE_TOKENS)]


class TextConfig(Config):
    """Names the file of the text tokenizer, and how large preparation makes it."""

    # The tokenizer's JSON; null: the 256 bytes, which need no training. What it holds is compared by itself.
    path: Annotated[Address | None, Nature.OPERATIONAL] = None
    vocabulary_size: int | None = Field(None, ge=BYTE_TOKENS)  # what preparation trains the file at `path` to, at most

    @model_validator(mode="after")
    def _rules(self) -> "TextConfig":
        if self.path is None and self.vocabulary_size is not None:
            raise ValueError("vocabulary_size is set, but without a path there is no trained tokenizer; set path too")
        return self

    def build(self, read: Read = read_file) -> "TextTokenizer":
        """Build the tokenizer; `read` reads its file, which may be far away."""
        if self.path is None:
            return TextTokenizer.bytes()
        tokenizer = TextTokenizer.load(self.path, read)
        if self.vocabulary_size is not None and tokenizer.size > self.vocabulary_size:
            raise DataError(
                f"{self.path} has {tokenizer.size} ids, more than tokenizers.text.vocabulary_size "
                f"{self.vocabulary_size}; raise it to that or train the tokenizer again"
            )
        return tokenizer


class TextTokenizer:
    """Encodes text by byte-level BPE without normalization, prefix space or special tokens: `decode(encode(s)) == s`.

    The 256 bytes always have ids, so nothing is unknown. A string that spells a special token is plain text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=False)

    @classmethod
    def bytes(cls) -> "TextTokenizer":
        """Build a tokenizer of one id a byte, id == byte."""
        return cls(_byte_level([]))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learn at most `vocab_size` ids: the 256 bytes (id == byte), then merges in the order learnt.

        Fewer where the texts hold no pair that occurs twice. Raises ValueError for a size below 256.
        """
        if vocab_size < BYTE_TOKENS:
            raise ValueError(f"a byte-level vocabulary has at least {BYTE_TOKENS} ids, not {vocab_size}")
        trained = _byte_level([])
        trainer = BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=_byte_symbols(), show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        merges = json.loads(trained.to_str())["model"]["merges"]
        return cls(_byte_level([tuple(merge) for merge in merges]))

    @classmethod
    def load(cls, path: str | Path, read: Read = read_file) -> "TextTokenizer":
        """Read the JSON of `save`, or any lossless byte-level BPE in the format of the `tokenizers` library.

        Special tokens in it are ignored: their ids lie outside `size`. Raises DataError.
        """
        try:
            content = read(str(path), "the text tokenizer").decode()
        except MissingFileError:
            raise DataError(
                f"{path} does not exist: tokenizers.text.path must name a tokenizer's JSON; train one, or "
                "set it to null for plain bytes"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} cannot be read as a text tokenizer ({error}); train it again") from error
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{path} is not a tokenizer of the tokenizers library ({error}); train it again") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a text that spells a special token stays text
        fault = _fault(json.loads(content), tokenizer)
        if fault:
            raise DataError(
                f"{path} would lose text: {fault}; name a byte-level BPE that changes nothing in tokenizers.text.path"
            )
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, readable by the `tokenizers` library and by transformers."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of vocabulary, merges and splitting: equal fingerprints give equal ids."""
        content = json.loads(self._tokenizer.to_str())
        parts = [
            sorted(self._tokenizer.get_vocab(with_added_tokens=False).items()),
            content["model"]["merges"],
        ]
        parts += [content["pre_tokenizer"], content["model"].get("ignore_merges", False)]
        return hashlib.sha256(canonical_json(parts)).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids i32 [n] of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text as `encode` does, on all cores."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; bytes that are no UTF-8 (a cut or generated sequence) become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(f"text ids {ids.min()}..{ids.max()} are not all in the vocabulary of {self.size}")
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def check_fingerprint(tokenizer: TextTokenizer, expected: str, path: str | Path) -> None:
    """Raises DataError unless the index in folder `path` was written with this tokenizer."""
    if tokenizer.fingerprint != expected:
        raise DataError(
            f"{path} holds text ids of another tokenizer (fingerprint {expected[:12]}, this run's is "
            f"{tokenizer.fingerprint[:12]}); prepare the source again with this tokenizer, or name the one "
            "it was prepared with in tokenizers.text.path"
        )


def _byte_level(merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer that `merges` define: ids 0..255 are the bytes, 256.. the merges in order."""
    symbols = _byte_symbols() + [left + right for left, right in merges]
    tokenizer = Tokenizer(BPE(vocab={symbol: id for id, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _fault(content: dict, tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer file is not lossless, or None."""
    model = content["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"its model sets {option}"
    if content.get("normalizer") is not None:
        return "it normalizes"
    steps = _steps(content.get("pre_tokenizer"))
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        return "it does not work on bytes"
    if any(step["add_prefix_space"] for step in levels):
        return "it adds a prefix space"
    if any(step.get("behavior") == "Removed" for step in steps):
        return "it removes what it splits at"
    if any(not token["special"] for token in content.get("added_tokens", [])):
        return "it has added tokens that are not special"
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    missing = set(_byte_symbols()) - set(vocabulary)
    if missing:
        return f"{len(missing)} of the 256 bytes have no id"
    if max(vocabulary.values()) >= len(vocabulary):
        return "its ids leave gaps"
    special = [token["content"] for token in content.get("added_tokens", [])]
    return probe_loss(tokenizer, special + _strings([content["pre_tokenizer"], content.get("decoder")]))


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """The pre-tokenizers in a sequence, however nested."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _strings(tree: object) -> list[str]:
    """All strings in JSON, among them the delimiters and patterns that a step looks for."""
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [string for part in parts for string in _strings(part)]
