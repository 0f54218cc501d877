"""Texts that a tokenizer which loses anything is likely to lose, to be encoded and decoded when one is loaded.

The parts of a tokenizer file (pre-tokenizers, decoders, post-processors, their options and nestings) are many, and the
library adds more: what they do together is found by doing it.
"""

import string
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import Tokenizer

_SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\v",
    "\f",
    "\x85",
    "\xa0",
    "\u2009",
    "\u2028",
    "\u2029",
    "\u3000",
]
_UNSEEN = ["\0", "\x1b", "\x7f", "\xad", "\u200b", "\u200d", "\u202e", "\u2060", "\ufe0f", "\ufeff", "\ufffd", "\ufffe"]
_NUMBERS = ["0", "7", "42", "1,000.50", "٣", "Ⅷ", "²"]
_LETTERS = ["A", "é", "e\u0301", "ß", "İ", "ﬁ", "Ａ", "ا\u064b", "की", "漢字", "ひらがな", "한국어", "각"]  # noqa: RUF001
_SYMBOLS = ["…", "“", "’", "、", "。", "€", "🙂", "👩\u200d👩\u200d👧", "🇯🇵", "👍🏽", "\ue000", "\U0010fffd"]  # noqa: RUF001
# What tokenizers write for themselves, in a text that only speaks of it.
_SPELLINGS = ["▁", "Ġ", "Ċ", "Ã", "##", "</w>", "<s>", "</s>", "<pad>", "<unk>", "[UNK]", "[CLS]", "[PAD]", "<0x0A>"]
_SPELLINGS += ["<|endoftext|>", "<|im_start|>", "<|bos|>", "@@ ", "|"]
_ENGLISH = ["n't", "'s", "'m", "'ve", "'re", " .", " ,", " ?", " !", " ' "]
_AROUND = ["{}", "{0}{0}", "a{}", "{}a", "a{}b", "a {} b", " {}", "{} ", "A{}1"]


def probe_loss(tokenizer: Tokenizer, own: Iterable[str]) -> str | None:
    """Say what a text loses when it is encoded and decoded, as the end of a sentence; None where nothing does.

    `own` are strings that this tokenizer treats as something else, its special tokens for example.
    """
    texts = [*_texts(own)]
    try:
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        decoded = tokenizer.decode_batch([e.ids for e in encoded], skip_special_tokens=False)
    except Exception as error:  # the library raises Exception itself
        return f"it cannot encode and decode all texts ({error})"
    for text, back in zip(texts, decoded, strict=True):
        if text != back:
            return f"{_short(text, back)!r} comes back as {_short(back, text)!r}"
    return None


def _texts(own: Iterable[str]) -> Iterable[str]:
    pieces = _SPACES + _UNSEEN + _NUMBERS + _LETTERS + _SYMBOLS + _SPELLINGS + _ENGLISH
    pieces += [*string.punctuation, *(piece for piece in own if piece)]
    for piece in pieces:
        yield from (around.replace("{0}", "{}").replace("{}", piece) for around in _AROUND)
    yield from (a + b for a, b in pairwise(_SPACES))
    # Every byte that occurs in UTF-8: all of one and two bytes, and each pair that three and four bytes begin with.
    points = [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64), *range(0x10000, 0x110000, 4096)]
    yield from ("".join(map(chr, points[at : at + 32])) for at in range(0, len(points), 32))
    yield " The quick  brown fox\r\n\tjumps — over\n\n 13 lazy dogs, isn't it?  "


def _short(text: str, other: str) -> str:
    """The part of a text about the first difference to the other."""
    same = next((n for n, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
    return text[max(0, same - 8) : same + 12]
