"""Compares answers with the normalization of SQuAD, which published numbers use."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from agentic_rag_env.unspaced import UNSPACED

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Bring an answer into the form that is compared.

    The text is lower-cased, then loses its ASCII punctuation and its articles (a, an, the), and then has single spaces.
    Other punctuation, such as typographic quotes and dashes, survives.
    """
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def comparable(text: str) -> str:
    """The form in which an answer is compared with another one: the result of `normalize_answer`, unless it is empty.

    If it is empty, the articles stay ("The The"). If there are none, the punctuation stays ("!!!"). So "A" matches "a",
    but no other text that normalization empties. A text that keeps something never equals one that keeps nothing.

    Returns:
        Empty only if the text is blank; a blank text matches nothing.
    """
    lowered = text.lower()
    return normalize_answer(text) or _spaced(lowered.translate(_DROP_PUNCTUATION)) or _spaced(lowered)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _aliases(golden_answers: str | Iterable[str]) -> list[str]:
    """The golden answers in the form in which they are compared, without blank ones."""
    given = (golden_answers,) if isinstance(golden_answers, str) else golden_answers
    return [alias for alias in map(comparable, given) if alias]


def exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """1.0 if the answer equals one of the golden answers after normalization, else 0.0.

    It differs from SQuAD where normalization empties a golden answer, such as "A". In SQuAD every empty answer and
    every article equals it. Here only the same article does; see `comparable`.

    Args:
        prediction: The answer; None and blank ones score 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    return float(prediction is not None and comparable(prediction) in _aliases(golden_answers))


def sub_exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """1.0 if the answer contains one of the golden answers after normalization, else 0.0.

    A golden answer that normalization empties must be matched exactly, because every text contains the empty text.

    Args:
        prediction: The answer; None and blank ones score 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    if prediction is None:
        return 0.0
    said, normal = comparable(prediction), normalize_answer(prediction)
    aliases = _aliases(golden_answers)
    return float(said in aliases or any(alias in normal for alias in aliases if normalize_answer(alias)))


def f1_score(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """Harmonic mean of the precision and recall of words, for the golden answer that fits best, in [0, 1].

    This is the measure of SQuAD: words count as often as they occur. A golden answer that normalization empties has no
    words and must be matched exactly.

    Args:
        prediction: The answer; None and blank ones score 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    if prediction is None:
        return 0.0
    aliases = _aliases(golden_answers)
    if comparable(prediction) in aliases:
        return 1.0
    words = normalize_answer(prediction).split()
    return max((_word_f1(words, normalize_answer(alias).split()) for alias in aliases), default=0.0)


def _word_f1(prediction: list[str], golden: list[str]) -> float:
    shared = (Counter(prediction) & Counter(golden)).total()
    return 2 * shared / (len(prediction) + len(golden)) if shared else 0.0


#: The ending of a possessive, with a typewriter's or a typesetter's apostrophe.
_POSSESSIVE = re.compile(r"(?<=\w)['’]s\b", re.IGNORECASE)
_MARK = re.compile(r"[^\w\s]|_")
#: An article that nothing but marks joins; that of "A-ha" is none.
_LONE_ARTICLE = re.compile(rf"(?<!\S)(?:{_MARK.pattern})*(?:an?|the)(?:{_MARK.pattern})*(?!\S)")
#: Marks that belong to a number when they stand between two digits.
_IN_NUMBERS = frozenset(".,:")
#: Stands between words of Khmer, Myanmar and Thai, but is no space to Python.
_ZERO_WIDTH_SPACE = "\u200b"


def holds_answer(text: str, golden_answers: Iterable[str]) -> bool:
    """Whether a text holds one of the answers as whole words, both normalized as for exact match.

    A word also ends at a possessive ending, a dash or another mark inside of it: "Ptolemy's" holds "Ptolemy", "1960–65"
    holds "1960". Numbers stay whole: "1,960" does not hold "960". Answers stay whole too: "McDonald" does not hold
    "McDonald's", and "ha" does not hold "A-ha". In scripts without blanks between words each character is a word. No
    text holds an answer that normalization empties.
    """
    forms = [f" {form} " for form in word_forms(text)]
    wanted = [f" {form} " for answer in golden_answers for form in answer_forms(answer)]
    return any(form in of_text for form in wanted for of_text in forms)


def words_of(text: str) -> list[str]:
    """The words of a text as normalized for exact match; in scripts without blanks each character is one."""
    return _apart(normalize_answer(text)).split()


@lru_cache(maxsize=4096)
def word_forms(text: str) -> tuple[str, ...]:
    """The words of a text in each form that may hold an answer: those of `answer_forms`, and without possessives."""
    return tuple(dict.fromkeys((*answer_forms(text), _cut_at_marks(_POSSESSIVE.sub("", text)))))


@lru_cache(maxsize=4096)
def answer_forms(answer: str) -> tuple[str, ...]:
    """The words of an answer as normalized for exact match and, where these differ, its words cut at marks too.

    Returns:
        The distinct forms that are not empty, with single spaces between words.
    """
    forms = (" ".join(words_of(answer)), _cut_at_marks(_POSSESSIVE.sub("s", answer)))
    return tuple(filter(None, dict.fromkeys(forms)))


def _cut_at_marks(text: str) -> str:
    text = _LONE_ARTICLE.sub(" ", text.lower())
    text = _MARK.sub(lambda mark: " " if _ends_word(mark) else mark.group(), text)
    return _apart(_spaced(text.translate(_DROP_PUNCTUATION)))


def _ends_word(mark: re.Match[str]) -> bool:
    """Whether a mark ends a word; accents, for instance, do not."""
    char, text, place = mark.group(), mark.string, mark.start()
    if char in _IN_NUMBERS:
        return not (text[place - 1 : place].isdigit() and text[place + 1 : place + 2].isdigit())
    return char == _ZERO_WIDTH_SPACE or unicodedata.category(char)[0] in "PS"


def _apart(text: str) -> str:
    """A text with single spaces in which each character of a script without blanks is set apart."""
    return text if text.isascii() else _spaced(UNSPACED.sub(r" \g<0> ", text))
