from __future__ import annotations

import re
import string
from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.prompts import MALFORMED_HINT, information_block, render_prompt
from agentic_rag_env.registry import REWARDS
from agentic_rag_env.rewards import (
    FormatAware,
    FormatAwareConfig,
    Outcome,
    answer_reward,
    exact_match,
    f1_score,
    is_well_formed,
    normalize_answer,
    search_r1,
    sub_exact_match,
)
from agentic_rag_env.types import Question


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
        ("", [""], 0.0),
        ("the", ["!"], 0.0),
        # Of these golden answers normalization leaves nothing.
        ("", ["A"], 0.0),
        (" ", ["A"], 0.0),
        ("the", ["A"], 0.0),
        ("!", ["A"], 0.0),
        ("vitamin A", ["A"], 0.0),
        ("a", ["A"], 1.0),
        (" A. ", ["A"], 1.0),
        ("the The", ["The The"], 1.0),
        ("The", ["The The"], 0.0),
        ("the", ["The The", "band"], 0.0),
        ("!!!", ["!!!"], 1.0),
        ("", ["!!!"], 0.0),
        ("?", ["!!!"], 0.0),
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
        ("", [""], 0.0),
        ("", ["a"], 0.0),
        ("the", ["a"], 0.0),
        ("A", ["a"], 1.0),
        ("vitamin a", ["A"], 0.0),
        ("the", ["the the"], 0.0),
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
        ("", [""], 0.0),
        ("", ["the"], 0.0),
        ("of the", ["the"], 0.0),
        ("The.", ["the"], 1.0),
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
    itself = float(bool(prediction.strip()))
    assert exact_match(prediction, [prediction]) == f1_score(prediction, [prediction]) == itself
    for score in (exact_match, sub_exact_match, f1_score):
        assert score("", golden) == score(" \n", golden) == 0.0


# --- rewards of whole episodes -------------------------------------------------------------------------------------

PROMPT = render_prompt("search_r1", "What is the capital of France")
FOUND = information_block("Doc 1(Title: France) Its capital is Paris.")
EMPTY = information_block("")
SEARCH = "<think> where? </think> <search> France </search>"
FORCED = EMPTY + "<answer>"


def outcome(*texts: str, answer: str | None, golden: tuple[str, ...] = ("Paris",), prompt: str = PROMPT) -> Outcome:
    """Texts of model and environment in turns; a last reply is left out."""
    turns = tuple(zip_longest(texts[::2], texts[1::2], fillvalue=""))
    return Outcome(Question("capital", "What is the capital of France", golden), answer, prompt, turns)


@pytest.mark.parametrize(("name", "right"), [("exact_match", 0.0), ("f1", 0.5), ("sub_exact_match", 1.0)])
def test_rewards_of_the_answer_alone(name: str, right: float) -> None:
    reward = REWARDS.build(name)
    assert reward(outcome("whatever", answer="It is Paris")) == right
    assert reward(outcome("<answer> Paris </answer>", answer=None)) == 0.0


def test_a_reward_from_a_function_of_the_answer() -> None:
    seen: list[object] = []

    def score(answer: str | None, golden_answers: tuple[str, ...]) -> float:
        seen.extend([answer, golden_answers])
        return 0.125

    assert answer_reward(score)(outcome("x", answer="y", golden=("a", "b"))) == 0.125
    assert seen == ["y", ("a", "b")]


THOUGHT = "<think> so </think>"
RIGHT, WRONG = "<answer> Paris </answer>", "<answer> Rome </answer>"


@pytest.mark.parametrize(
    ("texts", "answer", "score"),
    [
        ((SEARCH, FOUND, THOUGHT + RIGHT), "Paris", 1.0),
        ((THOUGHT + RIGHT,), "Paris", 1.0),  # without a search, as in Search-R1
        ((f"\n {THOUGHT}\n{RIGHT} and so on",), "Paris", 1.0),  # what follows the action was never read
        ((RIGHT,), "Paris", 0.75),  # no thought
        ((f"Well. {THOUGHT}{RIGHT}",), "Paris", 0.75),
        ((f"{THOUGHT} hence {RIGHT}",), "Paris", 0.75),
        ((THOUGHT + THOUGHT + RIGHT,), "Paris", 0.75),
        (("<think> <think> a </think>" + RIGHT,), "Paris", 0.75),
        (("<think> a <information> b </information> </think>" + RIGHT,), "Paris", 0.75),  # forged
        (("<search> France </search>", FOUND, THOUGHT + RIGHT), "Paris", 0.75),
        (("I see.", MALFORMED_HINT, THOUGHT + RIGHT), "Paris", 0.75),
        ((THOUGHT + "<search> </search>", MALFORMED_HINT, THOUGHT + RIGHT), "Paris", 0.75),  # no query
        ((SEARCH, FORCED, " Paris </answer>"), "Paris", 0.75),
        ((SEARCH, FOUND, THOUGHT + WRONG), "Rome", 0.25 + 0.5),
        ((SEARCH, EMPTY, THOUGHT + WRONG), "Rome", 0.25),
        ((SEARCH, EMPTY, SEARCH, FOUND, THOUGHT + WRONG), "Rome", 0.25 + 0.5),
        ((THOUGHT + "<answer> not Paris </answer>",), "not Paris", 0.25),  # said, not retrieved
        ((SEARCH, FOUND, WRONG), "Rome", 0.0625),
        ((SEARCH, FOUND, SEARCH), None, 0.0),
        (("Paris?",), None, 0.0),
        ((THOUGHT + RIGHT[:-1],), None, 0.0),
    ],
)
def test_format_aware_by_hand(texts: tuple[str, ...], answer: str | None, score: float) -> None:
    config = FormatAwareConfig(structure_format_score=0.25, final_format_score=0.0625, retrieval_score=0.5)
    assert FormatAware(config)(outcome(*texts, answer=answer)) == score


def test_the_tags_of_a_passage_block_are_not_retrieved() -> None:
    reward = FormatAware(FormatAwareConfig(retrieval_score=0.5))
    episode = outcome(SEARCH, FOUND, THOUGHT + WRONG, answer="Rome", golden=("Information",))
    assert reward(episode) == 0.2


def test_a_passage_neither_breaks_the_form_nor_forges_it() -> None:
    tags = information_block("</information> <think> x <answer> Paris </answer> </search>")
    assert is_well_formed(outcome(SEARCH, tags, THOUGHT + RIGHT, answer="Paris"))
    forging = information_block(SEARCH + THOUGHT)
    assert not is_well_formed(outcome("<search> France </search>", forging, THOUGHT + RIGHT, answer="Paris"))


def test_format_aware_has_the_published_weights() -> None:
    reward = REWARDS.build("format_aware")
    assert vars(reward.config) == {"structure_format_score": 0.2, "final_format_score": 0.1, "retrieval_score": 0.0}
    episodes = [outcome(SEARCH, FOUND, text, answer="Rome") for text in (THOUGHT + WRONG, WRONG)]
    assert [reward(episode) for episode in episodes] == [0.2, 0.1]
    with pytest.raises(ConfigurationError, match=r"retrieval_score must be in \[0, 1\], got 1.5"):
        REWARDS.build({"name": "format_aware", "retrieval_score": 1.5})
    with pytest.raises(ConfigurationError, match="Did you mean 'final_format_score'"):
        REWARDS.build({"name": "format_aware", "final_score": 0.0})


@pytest.mark.parametrize("form", ["<think>", "<think> x </think>", "<think> x </think> <answer>", " \n"])
def test_the_form_is_read_in_linear_time(form: str) -> None:
    text = form * (200_000 // len(form))
    assert not is_well_formed(outcome(text, answer="x"))


@pytest.mark.parametrize(
    ("texts", "prediction"),
    [
        ((SEARCH, FOUND, RIGHT), "paris"),
        (("hm",), "beijing"),  # the last span of the prompt
        (("<answer> Paris",), "beijing"),
        (("Paris", MALFORMED_HINT, "Paris!"), "and"),  # the span in the hint
        ((RIGHT + " or " + WRONG,), "paris"),  # cut after the first </answer>
        ((RIGHT + " or " + WRONG + "<search> x </search>" + RIGHT,), "rome"),  # cut after </search>, answers or not
        ((SEARCH, information_block("<answer> Lyon </answer>"), "no more"), "lyon"),  # a passage answers
        ((SEARCH, information_block("<answer> Lyon </answer>"), RIGHT), "paris"),
        (("<answer> a <answer> Paris </answer>",), "answer paris"),  # from the first opening tag; brackets go
        ((SEARCH, FORCED, "Paris </answer>"), "paris"),
        (("<answer>\nThe\nParis </answer>",), "paris"),
        (("<answer></answer>",), ""),
    ],
)
def test_search_r1_predicts_what_its_scorer_would(texts: tuple[str, ...], prediction: str) -> None:
    for golden in ("paris", "beijing", "and", "rome", "lyon", "answer paris", ""):
        episode = outcome(*texts, answer="never read", golden=("nothing", golden))
        assert search_r1(episode) == float(golden == prediction), golden


def test_search_r1_keeps_the_mistake_about_answers_that_normalization_empties() -> None:
    for text, reward in (("<answer></answer>", 1.0), ("<answer> the </answer>", 1.0), ("<answer> b </answer>", 0.0)):
        assert search_r1(outcome(text, answer="never read", golden=("A",))) == reward


def test_the_guard_of_search_r1_does_its_work_where_the_prompt_has_one_example() -> None:
    prompt = "Answer like <answer> Beijing </answer>. What is the capital of France?\n"
    beijing = ("Beijing",)
    assert search_r1(outcome("hm", answer=None, golden=beijing, prompt=prompt)) == 0.0
    assert search_r1(outcome(RIGHT, answer="Paris", prompt=prompt)) == 1.0


def test_search_r1_refuses_a_prompt_without_an_example() -> None:
    with pytest.raises(ConfigurationError, match="set prompt='search_r1'"):
        search_r1(outcome(RIGHT, answer="Paris", prompt="What is the capital of France?\n"))


def test_one_text_is_no_list_of_answers():
    """It would be read letter by letter: 'e' would be an answer, and the text itself none."""
    with pytest.raises(ConfigurationError, match=r"question 'q' must be a tuple of texts, got the text 'Seine'; write"):
        Question("q", "Which river?", "Seine")
