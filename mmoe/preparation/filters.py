"""Filters out samples that can be read but should not be learned from, by pure functions of a text or an image's size.

Each filter is off (None) unless its threshold is set, but for the share of replacement characters: a text full of
them was decoded wrongly. The first filter that a sample fails is the reason it is counted under.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from mmoe.config.base import Config
from mmoe.errors import ConfigError
from mmoe.optional import require

REPLACEMENT = "\ufffd"
_DIGITS = re.compile(r"\d+")
# A word, or one character of a script written without spaces (kana, Chinese characters, Thai, Lao, Khmer, Burmese).
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\d_]+|\d+")


class TextFilters(Config):
    """Holds the thresholds by which samples are left out for their texts, joined by line ends."""

    replacement_share: float | None = Field(0.01, ge=0, le=1)  # most U+FFFD of all characters
    min_characters: int | None = Field(None, ge=1)  # of all texts of a sample
    max_characters: int | None = Field(None, ge=1)  # of all texts of a sample
    digit_run: int | None = Field(None, ge=1)  # longest run of digits
    duplicate_lines: float | None = Field(None, ge=0, le=1)  # share of characters in lines that stood before
    ngram: int = Field(3, ge=1)  # words, for the next
    ngram_share: float | None = Field(None, ge=0, le=1)  # of words that lie in occurrences of the commonest n-gram
    languages: tuple[str, ...] = ()  # ISO 639-1, as py3langid names them; empty: all
    language_characters: int = Field(100, ge=1)  # shorter texts are of no language


class ImageFilters(Config):
    """Says which still images are left out; null keeps all."""

    min_side: int | None = Field(None, ge=1)  # pixels
    aspect: float | None = Field(None, ge=1)  # longer side over the shorter


class FilterConfig(Config):
    """Says which readable samples are left out, by their texts and their still images."""

    text: TextFilters = TextFilters()
    image: ImageFilters = ImageFilters()

    def check(self) -> None:
        """Check that the filters can run here.

        Raises PackageError where a filter needs a package that is not there, ConfigError for an unknown language.
        """
        if not self.text.languages:
            return
        library = require("py3langid", "prepare.filters.text.languages")
        try:
            library.set_languages(self.text.languages)
        except ValueError as error:
            raise ConfigError(
                f"prepare.filters.text.languages: {error}; give ISO 639-1 codes such as en, de, ja"
            ) from None
        finally:
            library.set_languages(None)  # classification is among all languages


@dataclass(frozen=True)
class Fault:
    """States the reason why a sample is removed.

    `reason` is the class it is counted under, `said` ends the sentence about it.
    """

    reason: str
    said: str


def find_fault(texts: Sequence[str], sizes: Sequence[tuple[int, int]], config: FilterConfig) -> Fault | None:
    """Return the fault by the first filter that a sample with these texts and images fails, or None.

    `sizes` are (height, width) of its still images in pixels.
    """
    faults = (fault for size in sizes for fault in _image_faults(*size, config.image))
    fault = next(faults, None)
    if fault is None and texts:
        fault = next(_text_faults("\n".join(texts), config.text), None)
    return fault


def replacement_share(text: str) -> float:
    """Measure the share of characters that are U+FFFD, which undecodable bytes become."""
    return text.count(REPLACEMENT) / max(1, len(text))


def longest_digit_run(text: str) -> int:
    """Measure the longest run of digits, in characters."""
    return max(map(len, _DIGITS.findall(text)), default=0)


def duplicate_line_share(text: str) -> float:
    """Measure the share of characters in lines that stood in the text before; blank lines do not count."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    once = sum(map(len, dict.fromkeys(lines)))
    return 1 - once / sum(map(len, lines)) if lines else 0.0


def ngram_share(text: str, n: int) -> float:
    """Measure the share of the words that lie in an occurrence of the commonest run of `n` words.

    It is 0 where no run occurs twice.
    """
    words = [word.casefold() for word in _WORD.findall(text)]
    counts = Counter(zip(*(words[i:] for i in range(n))))
    if not counts:
        return 0.0
    commonest, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    if count == 1:
        return 0.0
    covered: set[int] = set()  # occurrences may overlap
    for start in range(len(words) - n + 1):
        if tuple(words[start : start + n]) == commonest:
            covered.update(range(start, start + n))
    return len(covered) / len(words)


def language(text: str) -> str:
    """Return the ISO 639-1 code of the likeliest language."""
    return require("py3langid", "prepare.filters.text.languages").classify(text)[0]


def _image_faults(height: int, width: int, config: ImageFilters) -> Iterator[Fault]:
    short, long = sorted((height, width))
    if config.min_side is not None and short < config.min_side:
        yield Fault("small image", f"has an image of {height} x {width} pixels, a side below {config.min_side}")
    if config.aspect is not None and long > config.aspect * short:
        yield Fault("extreme aspect ratio", f"has an image of {height} x {width} pixels, beyond {config.aspect:g} to 1")


def _text_faults(text: str, config: TextFilters) -> Iterator[Fault]:
    if config.replacement_share is not None and (share := replacement_share(text)) > config.replacement_share:
        yield Fault(
            "replacement characters", f"consists of U+FFFD by {share:.1%}, above {config.replacement_share:.1%}"
        )
    if config.min_characters is not None and len(text) < config.min_characters:
        yield Fault("short text", f"has {len(text)} characters, fewer than {config.min_characters}")
    if config.max_characters is not None and len(text) > config.max_characters:
        yield Fault("long text", f"has {len(text)} characters, more than {config.max_characters}")
    if config.digit_run is not None and (run := longest_digit_run(text)) > config.digit_run:
        yield Fault("long run of digits", f"has {run} digits in a row, more than {config.digit_run}")
    if config.duplicate_lines is not None and (share := duplicate_line_share(text)) > config.duplicate_lines:
        yield Fault("repeated lines", f"consists of repeated lines by {share:.1%}, above {config.duplicate_lines:.1%}")
    if config.ngram_share is not None and (share := ngram_share(text, config.ngram)) > config.ngram_share:
        said = f"consists of one run of {config.ngram} words by {share:.1%}, above {config.ngram_share:.1%}"
        yield Fault("repeated words", said)
    if (
        config.languages
        and len(text) >= config.language_characters
        and (found := language(text)) not in config.languages
    ):
        yield Fault("language", f"is in {found}, not in {' or '.join(config.languages)}")
