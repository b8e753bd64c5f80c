from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_rag_env.registry import REWARDS
from agentic_rag_env.rewards import exact_match, f1_score, normalize_answer, sub_exact_match


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles", "beatles"),
        ("U.S.A.", "usa"),
        ("  an  Apple\n a day ", "apple day"),
        ("theory of a thesis", "theory of thesis"),
        ("O'Brien-Smith", "obriensmith"),
        ("ÉCOLE", "école"),
        ("“quoted” – dash", "“quoted” – dash"),  # only ASCII punctuation goes
        ("東京", "東京"),
        ("a\u00a0b", "b"),
        ("", ""),
        ("The", ""),
        ("!?", ""),
        ("\ud800", "\ud800"),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "golden", "score"),
    [
        ("The Beatles", ["beatles"], 1.0),
        ("beatles", ["The Beatles"], 1.0),
        ("U.S.A.", ["usa"], 1.0),
        ("Roma", ["Rome", "Roma"], 1.0),
        ("Milan", ["Rome", "Roma"], 0.0),
        ("Beatles song", ["Beatles"], 0.0),
        ("ecole", ["école"], 0.0),
        ("E\u0301cole", ["École"], 0.0),  # no Unicode normalization, as in the published scorer
        (None, ["Paris"], 0.0),
        (None, [""], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", [""], 0.0),
        ("", [""], 1.0),
        ("the", ["!"], 1.0),
        ("Paris", [], 0.0),
        ("Paris", "paris", 1.0),
        ("p", "paris", 0.0),  # a bare string is one alias, not five letters
    ],
)
def test_exact_match(prediction: str | None, golden: list[str], score: float) -> None:
    assert exact_match(prediction, golden) == score


@pytest.mark.parametrize(
    ("prediction", "golden", "score"),
    [
        ("Gustave Eiffel", ["Eiffel"], 2 * 1.0 * 0.5 / 1.5),  # precision 1/2, recall 1
        ("Eiffel", ["Gustave Eiffel"], 2 * 0.5 * 1.0 / 1.5),
        ("the cat sat on the mat", ["a cat on a mat"], 6 / 7),  # cat sat on mat: precision 3/4, recall 1
        ("x x y", ["x y y"], 2 / 3),  # words count as often as they occur: x, y
        ("x x y", ["x x z"], 2 / 3),  # here: x, x
        ("rome italy", ["paris", "rome", "italy rome"], 1.0),
        ("paris", ["london"], 0.0),
        ("", [""], 1.0),
        ("the", ["a"], 1.0),
        ("", ["paris"], 0.0),
        ("paris", ["!"], 0.0),
        ("paris", [], 0.0),
        (None, ["paris"], 0.0),
        ("Paris", "paris", 1.0),
    ],
)
def test_f1_by_hand(prediction: str | None, golden: list[str], score: float) -> None:
    assert f1_score(prediction, golden) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "golden", "score"),
    [
        ("It was Gustave Eiffel.", ["gustave eiffel"], 1.0),
        ("Eiffel", ["gustave eiffel"], 0.0),
        ("anything", [""], 0.0),
        ("", ["the"], 1.0),
        (None, [""], 0.0),
        ("x", ["y", "X"], 1.0),
    ],
)
def test_sub_exact_match(prediction: str | None, golden: list[str], score: float) -> None:
    assert sub_exact_match(prediction, golden) == score


def slow_normalize(text: str) -> str:
    """The SQuAD normalization, word by word instead of by substitution."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    words = [" " if word in ("a", "an", "the") else word for word in re.findall(r"\w+|\W", kept)]
    return " ".join("".join(words).split())


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(["a", "The", "an", " ", "–", "x", "É", ".", "_", "\n", "the"])).map("".join) | st.text()
)
def test_normalization_equals_the_slow_one(text: str) -> None:
    assert normalize_answer(text) == slow_normalize(text)


@settings(deadline=None, max_examples=200)
@given(st.text(), st.lists(st.text(), max_size=3))
def test_scores_are_ordered(prediction: str, golden: list[str]) -> None:
    match, sub, f1 = (score(prediction, golden) for score in (exact_match, sub_exact_match, f1_score))
    assert match <= sub <= 1.0
    assert match <= f1 <= 1.0
    assert exact_match(prediction, [*golden, prediction]) == f1_score(prediction, [*golden, prediction]) == 1.0


def test_rewards_are_registered_under_their_names() -> None:
    assert {name: REWARDS.build(name) for name in ("exact_match", "f1", "sub_exact_match")} == {
        "exact_match": exact_match,
        "f1": f1_score,
        "sub_exact_match": sub_exact_match,
    }
