"""Hashes that are the same on every machine and in every version: what is drawn, split and compared hangs on them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Words = TypeVar("Words", np.ndarray, "Tensor")

INCREMENT = 0x9E3779B97F4A7C15  # of splitmix64: 2^64 / the golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SIGNED_INCREMENT, _SIGNED_FIRST, _SIGNED_SECOND = (c - (1 << 64) for c in (INCREMENT, _FIRST, _SECOND))
_FNV = np.uint64(0x100000001B3)


def mix64(x: Words) -> Words:
    """Apply splitmix64's finalizer (Steele, Lea & Flood 2014) to i64 words, an array or a tensor.

    It is one to one, and every bit of the result depends on every bit of the word. Unsigned words go through a view.
    """
    x = (x ^ shifted_right(x, 30)) * _SIGNED_FIRST
    x = (x ^ shifted_right(x, 27)) * _SIGNED_SECOND
    return x ^ shifted_right(x, 31)


def shifted_right(x: Words, bits: int) -> Words:
    """Shift to the right with zeros from the left, where a signed shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed_u64(x: np.ndarray) -> np.ndarray:
    """Apply `mix64` to u64 words."""
    return mix64(x.view(np.int64)).view(np.uint64)


def rolling_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """Hash every run of `length` of the u64 `codes` to 32 bits: the powers of FNV's prime, then one round of mixing."""
    hashed = np.zeros(len(codes) - length + 1, np.uint64)
    for start in range(length):
        hashed = hashed * _FNV + codes[start : start + len(hashed)]
    hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(_FIRST)
    return (hashed >> np.uint64(32)).astype(np.uint32)


def blake2b(parts: Iterable[bytes | memoryview], size: int, key: bytes = b"") -> bytes:
    """Hash the parts, one behind the other, to `size` bytes."""
    digest = hashlib.blake2b(digest_size=size, key=key)
    for part in parts:
        digest.update(part)
    return digest.digest()


def framed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Put its length before every part, so that other parts that join to the same bytes have another hash."""
    for part in parts:
        yield len(part).to_bytes(8, "little")
        yield part


def hash64(*parts: bytes) -> int:
    """Hash the framed parts to a signed number of 64 bits."""
    return int.from_bytes(blake2b(framed(parts), 8), "little", signed=True)


def seed64(name: str) -> int:
    """Hash a name to a seed: a signed number of 64 bits, another than its `hash64`."""
    return int.from_bytes(blake2b([name.encode()], 8), "little", signed=True)


def canonical_json(value: Any) -> bytes:
    """Write a value as it is digested: equal values give equal bytes, in whatever order their keys stand."""
    return json.dumps(value, sort_keys=True).encode()
