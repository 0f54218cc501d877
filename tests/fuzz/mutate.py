"""Damage on purpose: bytes and trees of JSON, changed by a seeded generator, so that any input can be made again."""

import json
import random
import struct
from typing import Any

# What a damaged length, count, size or time looks like, in the widths that headers have.
EXTREMES = (0, 1, -1, 2, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**36, 2**63 - 1)
TEXTS = ("", "\x00", "\ud83d", "é" * 9, "a" * 5000, "../../etc/passwd", "1" * 5000, "nan", "{}", "[b]", "\x1b[31m")
VALUES = (None, True, False, [], {}, -1, 0, 1.5, 10**30, -(10**30), float("nan"), float("inf"), 1e308, 2**63)


def damage(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` after one to eight changes; some of them take pieces of `others`."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not content:
            break
        _CHANGES[rng.randrange(len(_CHANGES))](content, others, rng)
    return bytes(content)


def _flip(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _early_flip(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    """Headers decide most, and are short."""
    content[rng.randrange(min(256, len(content)))] ^= 1 << rng.randrange(8)


def _byte(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.choice((0, 255, 127, 128, rng.randrange(256)))


def _number(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    width, order = rng.choice((2, 4, 8)), rng.choice("<>")
    at = rng.randrange(min(len(content), rng.choice((512, len(content)))))
    code = {2: "H", 4: "I", 8: "Q"}[width]
    piece = struct.pack(order + code, rng.choice(EXTREMES) % 256**width)
    content[at : at + width] = piece[: len(content) - at]


def _cut_off(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _leave_out(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 3, 16, 200))]


def _repeat(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(content))
    piece = content[at : at + rng.choice((1, 8, 100, 1000))]
    content[at:at] = piece * rng.choice((1, 2, 20))


def _insert(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(content))
    content[at:at] = rng.randbytes(rng.choice((1, 4, 64)))


def _zeros(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at, length = rng.randrange(len(content)), rng.choice((4, 32, 500))
    content[at : at + length] = bytes(min(length, len(content) - at))


def _digits(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    """A number in text becomes another one: the shapes of npy headers, JSON, tar fields."""
    places = [at for at, byte in enumerate(content[:4096]) if 48 <= byte <= 57]
    if places:
        at = rng.choice(places)
        content[at : at + 1] = rng.choice((b"9" * 5, b"9" * 18, b"-1", b"0", b"e9", b"9" * 5000))


def _splice(content: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    at, start = rng.randrange(len(content)), rng.randrange(len(other))
    content[at:] = other[start:]


_CHANGES = (
    _flip,
    _flip,
    _early_flip,
    _early_flip,
    _byte,
    _number,
    _number,
    _cut_off,
    _leave_out,
    _repeat,
    _insert,
    _zeros,
    _digits,
    _splice,
)


def damage_json(document: Any, rng: random.Random) -> bytes:
    """A JSON document after some of its values, keys or bytes have changed."""
    tree = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = _changed(tree, rng)
    text = json.dumps(tree).encode()
    kind = rng.randrange(8)
    if kind == 0:
        return damage(text, [text], rng)
    if kind == 1:
        return b"[" * 20_000 + text
    if kind == 2:
        return b"\xef\xbb\xbf" + text
    return text


def _changed(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree))
        kind = rng.randrange(6)
        if kind == 0:
            tree.pop(key)
        elif kind == 1:
            tree[rng.choice(TEXTS)] = tree.pop(key)
        else:
            tree[key] = _changed(tree[key], rng)
        return tree
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        kind = rng.randrange(5)
        if kind == 0:
            tree.pop(at)
        elif kind == 1:
            tree.append(tree[at])
        else:
            tree[at] = _changed(tree[at], rng)
        return tree
    return rng.choice((*VALUES, *TEXTS, [tree], {"value": tree}))
