"""Scores of an answer against the golden answers, with the normalization of SQuAD that all published numbers use.

A reward is any function `(answer: str | None, golden_answers) -> float`; None means that no answer was given.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeAlias

from agentic_rag_env.registry import REWARDS

Reward: TypeAlias = Callable[[str | None, Iterable[str]], float]

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Bring an answer into the form that is compared.

    Lower case, then no ASCII punctuation, then no articles (a, an, the), then single spaces. Other punctuation, such
    as typographic quotes and dashes, survives.
    """
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _normalized(golden_answers: str | Iterable[str]) -> list[str]:
    aliases = (golden_answers,) if isinstance(golden_answers, str) else golden_answers
    return [normalize_answer(alias) for alias in aliases]


@REWARDS.register("exact_match")
def exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """1.0 if the answer equals one of the golden answers after normalization, else 0.0.

    Args:
        prediction: The answer; None scores 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    return float(prediction is not None and normalize_answer(prediction) in _normalized(golden_answers))


@REWARDS.register("sub_exact_match")
def sub_exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """1.0 if the answer contains one of the golden answers after normalization, else 0.0.

    A golden answer of which normalization leaves nothing must be matched exactly; every text contains it.

    Args:
        prediction: The answer; None scores 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    if prediction is None:
        return 0.0
    prediction = normalize_answer(prediction)
    return float(any(alias in prediction if alias else not prediction for alias in _normalized(golden_answers)))


@REWARDS.register("f1")
def f1_score(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """Harmonic mean of the precision and recall of words, for the golden answer that fits best, in [0, 1].

    The measure of SQuAD: words count as often as they occur; where normalization leaves nothing of one side, the score
    is 1 if nothing is left of the other either.

    Args:
        prediction: The answer; None scores 0.
        golden_answers: Accepted answers; a single string counts as one.
    """
    if prediction is None:
        return 0.0
    words = normalize_answer(prediction).split()
    return max((_word_f1(words, alias.split()) for alias in _normalized(golden_answers)), default=0.0)


def _word_f1(prediction: list[str], golden: list[str]) -> float:
    if not prediction or not golden:
        return float(prediction == golden)
    shared = (Counter(prediction) & Counter(golden)).total()
    return 2 * shared / (len(prediction) + len(golden))
