"""Finds, without any model, the parts of a text that an agent may want to search for or to answer with."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

#: Angle brackets end a word and a run, so that no span can spell a tag of the protocol.
_RAW_WORD = re.compile(r"[^\s<>]+")
_BREAK = re.compile(r"[<>\r\n]+")
#: Number of texts whose words and spans are kept. Passages may be long, and each is kept with the text itself.
_NUM_KEPT = 4096
_PUNCTUATION = string.punctuation + "“”‘’«»…–—。、「」？！،؟"


class Span(NamedTuple):
    """A part of a text.

    Attributes:
        text: The span, exactly as the text holds it.
        position: Number of words of the text before it.
    """

    text: str
    position: int


@lru_cache(maxsize=_NUM_KEPT)
def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without the punctuation around them."""
    return tuple(word for raw in _RAW_WORD.findall(text) if (word := raw.strip(_PUNCTUATION).lower()))


def common_words(
    texts: Iterable[str], min_fraction: float = 0.02, min_texts: int = 4, max_words: int = 64
) -> tuple[str, ...]:
    """The words that many texts share: those of a language and a subject, as opposed to names.

    Args:
        texts: Questions or passages.
        min_fraction: Share of the texts that a word must occur in, in [0, 1].
        min_texts: Number of texts that it must occur in, however few there are.
        max_words: Most words to return; the most common ones are kept.

    Returns:
        The words in lower case, the most common first; equally common ones in alphabetical order.
    """
    counts: Counter[str] = Counter()
    num_texts = 0
    for text in texts:
        counts.update(set(words(text)))
        num_texts += 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    threshold = max(min_texts, min_fraction * num_texts)
    return tuple(word for word, count in ranked[:max_words] if count >= threshold)


@lru_cache(maxsize=_NUM_KEPT)
def find_spans(text: str, common: frozenset[str]) -> tuple[Span, ...]:
    """The longest runs of words that are not common, in their order; punctuation and line breaks end a run.

    Args:
        text: A question or a passage.
        common: Words in lower case.
    """
    spans: list[Span] = []
    run: list[str] = []
    position = 0

    def end_run() -> None:
        if run:
            spans.append(Span(" ".join(run), position - len(run)))
            run.clear()

    for line in _BREAK.split(text):
        for raw in _RAW_WORD.findall(line):
            word = raw.strip(_PUNCTUATION)
            if not word or word.lower() in common or raw[0] in _PUNCTUATION:
                end_run()
            if word and word.lower() not in common:
                run.append(word)
            position += bool(word)
            if raw[-1] in _PUNCTUATION:
                end_run()
        end_run()
    return tuple(spans)
