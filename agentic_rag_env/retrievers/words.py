"""The words of a text, as BM25 and the hashed n-grams count them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from typing import Any

from agentic_rag_env.errors import ConfigurationError, required_library
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.settings import Allowed, check_settings, one_of, or_none
from agentic_rag_env.unspaced import UNSPACED, UNSPACED_CHARS

#: Number of the way in which each tokenizer cuts texts into words. It goes up when the same text gives other words,
#: since an index of the old words is then of no use.
WORDS = {"words": 2, "bigrams": 3}
TOKENIZERS = tuple(WORDS)
_LANGUAGE = Allowed("a name such as english", lambda value: isinstance(value, str))
_UNSPACED_RUN = re.compile(f"[{UNSPACED_CHARS}]+")


@cache
def word_pattern(least: int = 1, most: int | None = None) -> re.Pattern[str]:
    r"""Pattern of a word of `least` to `most` characters: letters, digits, underscores, and marks after the first.

    The marks are accents and vowel signs (Unicode's Mn and Mc), which Python's `\w` lacks: without them, words of
    Hindi fall into letters. Variation selectors are none, since they only choose the look of a character.
    """
    kinds = (
        (number, unicodedata.category(chr(number)) in ("Mn", "Mc") and not 0xFE00 <= number <= 0xFE0F)
        for number in range(0x300, 0x20000)
    )
    runs = [[number for number, _ in run] for is_mark, run in groupby(kinds, lambda kind: kind[1]) if is_mark]
    # Ranges, because a pattern looks at one mark after another: 300 of them instead of 2,100.
    marks = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
    return re.compile(rf"\w[\w{marks}]{{{least - 1},{'' if most is None else most - 1}}}")


def composed(text: str) -> str:
    """The text in Unicode's form NFC, in which an accented letter is one character wherever it comes from."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Tokenizer:
    """Cuts texts into words; see `BM25Config` for the settings.

    Raises:
        ConfigurationError: There is no such tokenizer, or a setting is no name.
    """

    tokenizer: str = "words"
    stemmer: str | None = None
    stopwords: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, one_of(TOKENIZERS), "tokenizer")
        check_settings(self, or_none(_LANGUAGE), "stemmer", "stopwords")

    def words(self, texts: Iterable[str]) -> list[list[str]]:
        """The words of each text that count, in their order; each distinct word of all texts is stemmed once.

        Raises:
            ConfigurationError: The stemmer or the list of stop words is missing.
        """
        return self._cut(map(self._prepared, texts))

    def first_words(self, texts: Sequence[str], count: int) -> list[list[str]]:
        """The words among the first `count` of each text; the rest of the text is not cut into words."""
        return self._cut(_beginning(self._prepared(text), count) for text in texts)

    def _prepared(self, text: str) -> str:
        text = composed(text)
        return _with_bigrams(text) if self.tokenizer == "bigrams" else text

    def _cut(self, texts: Iterable[str]) -> list[list[str]]:
        import bm25s

        pattern = word_pattern(1 if self.stopwords is None else 2).pattern
        options: dict[str, Any] = {"token_pattern": pattern, "stemmer": _stemmer(self.stemmer), "return_ids": False}
        try:
            return bm25s.tokenize(list(texts), stopwords=self.stopwords, **options, show_progress=False)
        except ValueError as error:
            raise ConfigurationError(
                f"bm25s has no list of stop words {self.stopwords!r}; it has english, german, french and others."
            ) from error


def unspaced_chars(text: str) -> int:
    """The number of characters of a text that are in scripts without blanks between words."""
    return 0 if text.isascii() else sum(map(len, _UNSPACED_RUN.findall(text)))


def _with_bigrams(text: str) -> str:
    """The text with each unspaced run as its overlapping pairs of characters, as Lucene's analyzer for CJK has them."""
    return text if text.isascii() else _UNSPACED_RUN.sub(_pairs, text)


def _pairs(run: re.Match[str]) -> str:
    chars = UNSPACED.findall(run.group())
    return f" {' '.join(''.join(chars[place : place + 2]) for place in range(max(1, len(chars) - 1)))} "


def _beginning(text: str, count: int) -> str:
    """The text up to its `count`-th word."""
    if len(text) <= count:
        return text
    return text[: max((match.end() for match in islice(word_pattern().finditer(text), count)), default=0)]


def _stemmer(language: str | None) -> Any:
    """A new stemmer at each call, because two threads must not share one, and none can be copied."""
    if language is None:
        return None
    with required_library(
        f"bm25 stemmer={language!r} needs the library PyStemmer: pip install PyStemmer; stemmer=null does without."
    ):
        import Stemmer
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        raise ConfigurationError(
            f"PyStemmer has no stemmer {language!r}.{did_you_mean(language, Stemmer.algorithms())}"
        ) from None
