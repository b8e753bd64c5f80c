"""The ARC probes: every figure on transcripts known by heart, and agents whose figures the tiny world predicts."""

from __future__ import annotations

import http.server
import json
import re
import threading
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from agentic_rag_env.answers import holds_answer
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.tiny import TinyConfig, make_world, tiny
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError, UnknownNameError
from agentic_rag_env.probes import (
    DEFAULT_PROBES,
    Endpoint,
    EndpointConfig,
    EndpointError,
    Material,
    Prompt,
    figure,
    find_gold,
    interval,
    macro_interval,
    play,
    run_probes,
    share,
)
from agentic_rag_env.probes.material import DIRECTLY
from agentic_rag_env.registry import PROBES
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.types import Ending, Passage, Question
from agentic_rag_env.vector import AgenticRAGVectorEnv


def values(figures) -> dict[str, float]:
    return {name: round(found["value"], 12) for name, found in figures.items()}


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_figure_is_a_mean_with_its_number_of_items_and_interval():
    found = figure([True, False, True, True])
    assert found["value"] == 0.75
    assert found["n"] == 4
    low, high = found["interval"]
    assert 0 <= low < 0.75 < high <= 1
    point = {"value": pytest.approx(0.3), "n": 7, "interval": (0.3, 0.3)}
    assert figure([0.3] * 7) == point | {"best": None, "share": False}
    assert figure([0.3] * 7, "low") == point | {"best": "low", "share": False}
    assert share([0.3] * 7, "high") == point | {"best": "high", "share": True}
    # 1 + 0 + 2 malformed of 2 + 3 + 2 turns; three episodes.
    weighted = figure([1, 0, 2], weights=[2, 3, 2])
    assert weighted["value"] == 3 / 7
    assert weighted["n"] == 3
    assert weighted["interval"][0] == 0.0  # a sample of the second episode alone
    assert weighted["interval"][1] == 1.0


@pytest.mark.parametrize("values", [[0, 1] * 300 + [1] * 400, list(np.linspace(0, 1, 150) ** 2)])
def test_intervals_agree_with_scipy(values):
    oracle = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1))
    assert interval(values) == pytest.approx(tuple(oracle.confidence_interval), abs=0.004)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)


def test_the_interval_of_a_macro_average_resamples_each_group():
    rng = np.random.default_rng(0)
    small, large = rng.random(40), rng.random(400)
    halfwidth = np.subtract(*macro_interval([small, large])[::-1]) / 2
    expected = 1.96 * np.sqrt(small.var() / 40 + large.var() / 400) / 2
    assert halfwidth == pytest.approx(expected, rel=0.08)
    assert macro_interval([[1, 1], [0, 0, 0]]) == (0.5, 0.5)


# --- gold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answers", "held"),
    [
        ("The party was in Rome.", ["art"], False),
        ("The art of war", ["Art"], True),
        ("It was The Beatles!", ["beatles"], True),
        ("born in U.S.A. long ago", ["USA"], True),
        ("Rome\nis old", ["Oslo", "old"], True),
        ("anything", ["the"], False),
        ("It is _the_ city—the capital", ["_the_"], False),
        ("New York City", ["York New"], False),
        ("Ptolemy's geography", ["Ptolemy"], True),
        ("Ptolemy’s geography", ["Ptolemy"], True),
        ("the 1960–65 war", ["1960"], True),
        ("the 1960-65 war", ["65"], True),
        ("the war of 1960—it was long", ["1960"], True),
        ("l’Italie", ["Italie"], True),
        ("a (so-called) “Rome”", ["Rome"], True),
        ("McDonald's restaurants", ["McDonald's"], True),
        ("O’Brien’s book", ["O'Brien"], True),
        ("1,960 men, 3.5 miles", ["960"], False),
        ("1,960 men, 3.5 miles", ["5"], False),
        ("1,960 men, 3.5 miles", ["1,960"], True),
        ("1,960 men, 3.5 miles", ["1960"], True),
        ("Ptolemy's geography", ["s"], False),
        ("Ptolemys geography", ["Ptolemy"], False),
        ("McDonald’s restaurants", ["McDonald's"], True),
        ("“Levi’s Stadium”", ["Levi's Stadium"], True),
        ("Ronald McDonald is a clown", ["McDonald's"], False),
        ("They visited Ha Long Bay", ["A-ha"], False),
        ("a song of A–ha, the band", ["A-ha"], True),
        ("I have a dream", ["The-Dream"], False),
        ("He won 1 game", ["A-1"], False),
        ("the Spider–Man", ["The Spider-Man"], True),
        ("a band—the Beatles", ["“The Beatles”"], True),
        ("Will-o’-the-wisp", ["Will-o'-the-wisp"], True),
        ("北京是中国的首都。", ["北京"], True),
        ("中国的首都是北京", ["Peking", "北京"], True),
        ("北海和南京", ["北京"], False),
        ("在Paris的首都", ["Paris"], True),
        ("它建于1969年", ["1969"], True),
        ("它建于1969年", ["69"], False),
        ("東京タワー", ["タワー"], True),
        ("レオナルド・ダ・ヴィンチ", ["レオナルド＝ダ＝ヴィンチ"], True),
        ("กรุงเทพเป็นเมืองหลวง", ["กรุงเทพ"], True),
        ("กินข้าว", ["ก"], False),  # a letter with its vowel sign is one character
        ("ភ្នំ\u200bពេញ ជារាជធានី", ["ភ្នំពេញ"], True),
        ("서울은 수도이다", ["수도"], False),  # Korean has blanks between words
        ("", ["Rome"], False),
    ],
)
def test_answers_are_matched_as_whole_words_after_normalization(text, answers, held):
    assert holds_answer(text, answers) is held


def test_gold_passages_come_from_every_documented_field():
    rows = [
        {"supporting": ["p2", "p1"]},
        {"supporting": ["p2", "elsewhere"]},
        {"gold_passages": ["T\nx", {"title": "The U", "text": "y"}, {"contents": "V\nz"}]},
        {"paragraphs": [{"title": "A", "paragraph_text": "a", "is_supporting": False},
                        {"title": "B", "paragraph_text": "b", "is_supporting": True}]},
        {"positive_ctxs": [{"title": "C", "text": "c"}, {"title": "D", "text": "d"}]},
        {"supporting_titles": ["The E", "E"]},
        {},
        {"supporting": ["p1", "p1", "p2"]},
        {"gold_passages": ["T\nx y", "T\nx y", {"title": "The The", "text": "z"}]},
        {"supporting_titles": ["A", "The The", " ", "C++"]},
    ]  # fmt: skip
    questions = [Question(str(number), "?", ("x",), row) for number, row in enumerate(rows)]
    corpus = [Passage("p1", "One\n1"), Passage("p2", "Two\n2"), Passage("p3", "Three\n3")]
    found = find_gold(questions, corpus)
    assert [[passage.contents for passage in gold.passages] for gold in found] == [
        ["Two\n2", "One\n1"], [], ["T\nx", '"The U"\ny', "V\nz"], ['"B"\nb'], ['"C"\nc'], [], [],
        ["One\n1", "Two\n2"], ["T\nx y", '"The The"\nz'], [],
    ]  # fmt: skip
    assert [gold.ids for gold in found[:3]] == [{"p1", "p2"}, {"p2", "elsewhere"}, set()]
    assert [gold.titles for gold in found] == [
        {"one", "two"}, {"two"}, {"t", "u", "v"}, {"b"}, {"c"}, {"e"}, set(),
        {"one", "two"}, {"t", "the the"}, {"a", "the the", "c"},
    ]  # fmt: skip
    assert [len(gold.pieces) for gold in found] == [2, 2, 3, 1, 1, 1, 0, 2, 2, 3]
    assert found[0].found_in([Passage("p1", "renamed")]) == {"p1"}
    assert found[0].found_in([Passage("hash", '"Two"\n2 '), Passage("other", "One\n2")]) == {"p2"}
    assert found[3].found_in([Passage("any", '"B"\nanother paragraph')]) == {"b"}
    assert find_gold(questions[:1], None)[0].passages == ()


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"supporting": "p1"}, "expected a list, got 'p1'"),
        ({"supporting": [["Rome", 0]]}, "expected ids of passages, strings as in the corpus, got ['Rome', 0]"),
        ({"supporting": ["1", 2]}, "expected ids of passages, strings as in the corpus, got 2"),
        ({"gold_passages": [{"title": "no text"}]}, "has 'contents', or 'title' and 'text'"),
        ({"paragraphs": [{"title": "A"}]}, "each needs 'is_supporting'"),
    ],
)
def test_gold_of_another_form_is_an_error_that_names_the_question(metadata, said):
    with pytest.raises(DataError, match="Question 'q7'") as error:
        find_gold([Question("q7", "?", ("x",), metadata)], None)
    assert said in str(error.value)


def test_integer_ids_of_tables_are_the_ids_of_the_corpus(tmp_path):
    passages = {"id": [1, 2], "title": ["Rome", "Oslo"], "text": ["Rome lies on the Tiber.", "Oslo is in Norway."]}
    questions = {"id": [7], "question": ["Which river?"], "golden_answers": [["Tiber"]],
                 "metadata": [{"supporting": [1]}]}  # fmt: skip
    for name, columns in (("corpus", passages), ("questions", questions)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("questions", "corpus")}
    envs = AgenticRAGVectorEnv(1, dataset={"name": "jsonl", **files}, retriever="bm25", autoreset_mode="Disabled")

    def generate(prompts):
        return ["<answer>Tiber</answer>" if "<information>" in text else "<search>Rome</search>" for text in prompts]

    found = run_probes(Material(envs.dataset, generate, play(generate, envs)), DEFAULT_PROBES)
    assert found["query_rewriting"]["passage_recall"]["value"] == 1.0
    assert found["search_behaviour"]["evidence_complete"]["value"] == 1.0


# --- reading, on four questions known by heart -----------------------------------------------------------------------

READING = [
    Question("seine", "Which river flows through Paris?", ("Seine",), {"gold_passages": ["Paris\nThe Seine flows."]}),
    Question("oslo", "What is the capital of Norway", ("Oslo",), {"gold_passages": ["Norway\nIts capital is Oslo."]}),
    Question("eiffel", "Who built the tower?", ("Eiffel",), {"gold_passages": ["Tower\nBuilt by Eiffel."]}),
    Question("verdi", "Who composed Aida?", ("Verdi",), {"gold_passages": ["Aida\nAn opera by Verdi."]}),
    Question("lost", "Whose gold is not known?", ("Nobody",)),
]
ANSWERS = {question.text.rstrip("?"): question.golden_answers[0] for question in READING}


def asked(prompt: Prompt) -> str:
    return prompt.message.strip().rstrip("?")


def docs(prompt: Prompt) -> list[str]:
    return re.findall(r"Doc \d+\(Title: [^)]*\) ([^\n<]*)", prompt.transcript)


def read(generate, probe, **settings):
    return run_probes(Material(READING, generate), [{"name": probe, **settings}])[probe]


def test_the_prompt_of_source_referencing_is_the_protocol_to_the_letter():
    prompts = []

    def generate(given):
        prompts.extend(given)
        return [""] * len(given)

    read(generate, "source_referencing")
    others = "".join(re.findall(r"\nDoc [23]\(Title: \w+\) [^\n<]+", prompts[1]))
    assert prompts[1] == (
        "What is the capital of Norway?\n\n\n<information>Doc 1(Title: Norway) Its capital is Oslo."
        f"{others}</information>\n\n<think></think><answer>"
    )
    assert (prompts[1].message, prompts[1].opening) == ("What is the capital of Norway?\n", "<think></think><answer>")
    assert prompts[1].transcript.startswith("\n\n<information>")
    # 4 in a block of 3, 4 alone, 4 in each of 3 places, 4 without evidence.
    assert len(prompts) == 4 + 4 + 3 * 4 + 4
    assert {prompt.opening for prompt in prompts[-4:]} == {""}
    for prompt in prompts[:4]:
        assert [ANSWERS[asked(prompt)] in text for text in docs(prompt)] == [True, False, False]
    for prompt in prompts[4:8]:
        assert [ANSWERS[asked(prompt)] in text for text in docs(prompt)] == [True]
    for place in range(3):
        for prompt in prompts[8 + 4 * place : 12 + 4 * place]:
            gold = next(text for text in docs(prompt) if ANSWERS[asked(prompt)] in text)
            assert docs(prompt).index(gold) == place
            assert len(set(docs(prompt))) == 3
    for prompt in prompts[-4:]:
        assert len(docs(prompt)) == 3
        assert ANSWERS[asked(prompt)] not in prompt.transcript


def test_source_referencing_by_hand():
    script = {"seine": " the Seine </answer> more", "oslo": " Oslo city</answer>", "eiffel": " Eiffel", "verdi": " ?"}
    by_question = {question.text.rstrip("?"): script.get(question.id) for question in READING}
    found = read(lambda prompts: [by_question[asked(prompt)] for prompt in prompts], "source_referencing")
    shown = values(found)
    assert shown["exact_match"] == 0.25  # the Seine
    assert shown["f1"] == pytest.approx((1 + 2 / 3) / 4)  # Oslo city
    assert shown["format_failures"] == 0.5  # Eiffel and ? are never closed
    assert shown["without_gold"] == 0.2
    assert found["without_gold"]["n"] == 5
    assert {found[name]["n"] for name in ("exact_match", "f1", "distractors_effect", "absent_answered")} == {4}


def test_a_reader_of_the_first_passage_only_depends_on_its_place():
    def generate(prompts):
        return [docs(prompt)[0].split()[-1].strip(".") + "</answer>" for prompt in prompts]

    texts = {"seine": "Paris\nOn the Seine.", "oslo": "Norway\nIt is Oslo."}
    questions = [
        Question(q.id, q.text, q.golden_answers, {"gold_passages": [texts.get(q.id, q.metadata["gold_passages"][0])]})
        for q in READING[:4]
    ]
    shown = values(run_probes(Material(questions, generate), ["source_referencing"])["source_referencing"])
    assert shown["exact_match"] == 1
    assert [shown[f"position_{place}_exact_match"] for place in (1, 2, 3)] == [1, 0, 0]
    assert shown["distractors_exact_match"] == pytest.approx(1 / 3)
    assert shown["distractors_effect"] == pytest.approx(-2 / 3)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda prompt: "<answer> Atlantis </answer>", {"answered": 1, "invented": 1}),
        (lambda prompt: f"<answer> {docs(prompt)[0].split()[-1]} </answer>", {"answered": 1}),
        (lambda prompt: f"<answer> {'-'.join(docs(prompt)[0].split()[-2:])} </answer>", {"answered": 1}),
        (lambda prompt: "<answer> I don't know. </answer>", {"abstained": 1}),
        (lambda prompt: "<think>x</think><search> more </search>", {"searched": 1}),
        (lambda prompt: "Atlantis", {"malformed": 1}),
    ],
)
def test_without_evidence_an_agent_answers_searches_abstains_or_does_neither(reply, expected):
    found = read(lambda prompts: [reply(prompt) for prompt in prompts], "source_referencing")
    shares = {name.removeprefix("absent_"): v for name, v in values(found).items() if name.startswith("absent_")}
    nothing = dict.fromkeys(("answered", "invented", "searched", "abstained", "malformed"), 0)
    assert shares == nothing | expected


def test_a_prompt_that_is_too_long_is_no_failure_of_format():
    """Of four questions one can never be read, one is answered, and two replies are malformed."""
    script = {"oslo": "Oslo</answer>", "eiffel": "?", "verdi": "?"}
    by_question = {question.text.rstrip("?"): script.get(question.id) for question in READING}

    def generate(prompts):
        return [by_question[asked(prompt)] for prompt in prompts]

    found = values(read(generate, "source_referencing"))
    assert (found["exact_match"], found["format_failures"], found["too_long"]) == (0.25, 0.5, 0.25)
    assert (found["absent_malformed"], found["absent_too_long"]) == (0.75, 0.25)
    thought = values(read(generate, "thinking"))
    assert (thought["format_failures"], thought["too_long"]) == (0.75, 0.25)


def test_who_cannot_read_a_longer_prompt_is_not_distracted():
    """The model answers all that it can read. With distractors one prompt of four is too long, then all are."""

    def reader(limits):
        def generate(prompts):
            return [
                f"{ANSWERS[asked(prompt)]}</answer>" if len(docs(prompt)) <= limits.get(asked(prompt), 1) else None
                for prompt in prompts
            ]

        return generate

    rest = dict.fromkeys(list(ANSWERS)[1:], 3)
    found = read(reader(rest), "source_referencing")
    assert found["distractors_too_long"]["value"] == 0.25
    names = ["alone_exact_match", *(f"position_{place}_exact_match" for place in (1, 2, 3)), "distractors_exact_match"]
    assert {(found[name]["value"], found[name]["n"]) for name in names} == {(1.0, 3)}
    assert (found["distractors_effect"]["value"], found["distractors_effect"]["n"]) == (0.0, 3)
    none = values(read(reader({}), "source_referencing"))
    assert none["distractors_too_long"] == 1.0
    assert "distractors_effect" not in none


def test_thinking_is_compared_where_both_prompts_are_read():
    """The prompt that closes the thought is longer. For one question of four it is too long."""

    def generate(prompts):
        return [
            None
            if prompt.opening == DIRECTLY and asked(prompt) == "Who built the tower"
            else f"{'' if prompt.opening == DIRECTLY else '</think><answer>'}{ANSWERS[asked(prompt)]}</answer>"
            for prompt in prompts
        ]

    found = read(generate, "thinking")
    assert (found["gain"]["value"], found["gain"]["n"], found["exact_match"]["n"]) == (0.0, 3, 4)


def test_distractors_are_the_matches_of_the_question_without_gold_and_answers():
    corpus = [
        Passage("a", "Paris\nThe Seine flows."),  # gold
        Passage("b", "France\nThe river Seine is long, which flows through Paris."),  # holds the answer
        Passage("c", "Paris\nWhich river? The Bievre flows through Paris too."),
        Passage("d", "Lyon\nThe Rhone flows through Lyon."),
        Passage("e", "Bern\nWhich city?"),
    ]
    question = Question("seine", READING[0].text, ("Seine",), {"supporting": ["a"]})
    seen = []

    def generate(prompts):
        seen.extend(docs(prompts[0]))
        return [""] * len(prompts)

    material = Material([question], generate, retriever=BM25Retriever(BM25Config(), corpus), corpus=corpus)
    found = run_probes(material, ["source_referencing"])["source_referencing"]
    assert set(seen) == {corpus[0].text, *(passage.text for passage in corpus[2:])}
    assert found["position_3_exact_match"]["n"] == 1
    alone = run_probes(Material([question], generate, corpus=corpus), ["source_referencing"])["source_referencing"]
    assert not any(name.startswith(("position", "absent", "distractors")) for name in alone), "nothing to distract with"


def test_a_gold_passage_does_not_distract_whatever_the_form_of_its_title():
    gold = {"paragraphs": [{"title": "Paris", "paragraph_text": "The Seine flows.", "is_supporting": True}]}
    corpus = [Passage("a", '"Paris"\nThe Seine flows.'), Passage("d", '"Lyon"\nThe Rhone flows through Lyon.')]
    for metadata in (gold, {"gold_passages": ["Paris\nThe Seine flows."]}):
        question = Question("q", "What flows?", ("nothing of these",), metadata)
        material = Material([question], retriever=BM25Retriever(BM25Config(), corpus), corpus=corpus)
        assert material.distractors(0, 3) == [replace(corpus[1], score=ANY)]


def test_what_is_read_is_a_perfect_search_result_of_the_usual_size():
    texts = [f"T{number}\ntext {number}" for number in range(4)]
    hops = [Question(str(n), f"Number {n}?", ("none",), {"gold_passages": texts[:n]}) for n in (1, 2, 4)]
    material = Material(hops, top_k=3)
    shown = [[passage.contents for passage in block] for block in material.evidence]
    assert [block[:n] for block, n in zip(shown, (1, 2, 4), strict=True)] == [texts[:1], texts[:2], texts]
    assert [len(block) for block in shown] == [3, 3, 4], "never fewer than all gold passages"
    assert all(set(block) <= set(texts) and len(set(block)) == len(block) for block in shown)
    assert material.distractors(2, 1) == [], "all that is known is gold"


def test_the_number_of_questions_with_distractors_is_bounded():
    found = read(lambda prompts: [""] * len(prompts), "source_referencing", num_questions=3, num_distractors=1)
    assert found["exact_match"]["n"] == 4
    assert found["position_2_exact_match"]["n"] == found["absent_invented"]["n"] == 3
    assert "position_3_exact_match" not in found


def test_thinking_by_hand():
    script = {
        "seine": " it is there </think> <answer> Seine </answer>",
        "oslo": " <answer> Oslo </answer> </think> <answer> Oslo </answer>",  # acts before the thought is closed
        "eiffel": " hm </think><search> Eiffel </search>",
        "verdi": " an opera </think> Verdi",
    }
    by_question = {question.text.rstrip("?"): script.get(question.id) for question in READING}

    def generate(prompts):
        return [
            by_question[asked(prompt)] if prompt.opening == "<think>" else ANSWERS[asked(prompt)] + "</answer>"
            for prompt in prompts
        ]

    found = read(generate, "thinking")
    assert values(found) == {
        "without_gold": 0.2,
        "exact_match": 0.25,
        "f1": 0.25,
        "gain": -0.75,
        "format_failures": 0.5,
        "searched": 0.25,
        "exact_match_well_formed": 1.0,
    }
    assert found["exact_match_well_formed"]["n"] == 1
    assert found["gain"]["n"] == 4


def test_without_any_gold_only_that_is_said():
    material = Material(READING[-1:], lambda prompts: pytest.fail("nothing is to be read"))
    for probe in ("source_referencing", "thinking"):
        assert run_probes(material, [probe])[probe] == {"without_gold": share([True])}


# --- searching, on episodes known by heart ---------------------------------------------------------------------------

CITY = Passage("p1", "Ada\nAda lives in Rome.")
RIVER = Passage("p2", "Rome\nRome lies on the river Tiber.")
OTHER = Passage("p3", "Bob\nBob lives in Oslo.")
QUESTIONS = [
    Question(name, "What is the river of the home of Ada?", ("Tiber",), {"supporting": ["p1", "p2"]})
    for name in ("straight", "no search", "hasty", "halfway", "endless", "silent")
]


def episode(question_id, *steps):
    """Steps as (action, query or answer, passages); passages None: a search that was not executed."""
    infos, executed = [], 0
    for turn, (action, text, passages) in enumerate(steps, 1):
        executed += action == "search" and passages is not None
        correct = action == "answer" and text == "Tiber"
        infos.append({
            "question_id": question_id, "turn": turn, "action": action, "query": text if action == "search" else None,
            "passages": tuple(passages or ()), "answer": text if action == "answer" else None,
            "exact_match": float(correct), "f1": float(correct), "num_searches": executed, "correct": correct,
            "error": None,
        })  # fmt: skip
    return infos


EPISODES = [
    episode("straight", ("search", "Ada home", [CITY]), ("search", "Rome river", [RIVER]), ("answer", "Tiber", None)),
    episode("no search", ("answer", "Nile", None)),
    episode("hasty", ("search", "what is river of home of ada", [OTHER]), ("malformed", None, None),
            ("answer", "Nile", None)),
    episode("halfway", ("malformed", None, None), ("search", "Ada", [CITY, OTHER]), ("answer", "Rome", None)),
    episode("endless", ("search", "Rome river", [RIVER, CITY]), ("search", "rome RIVER!", [RIVER]),
            ("search", "Rome", None)),
    episode("silent", ("malformed", None, None), ("malformed", None, None)),
]  # fmt: skip


def test_query_rewriting_by_hand():
    class Verbatim:
        def search(self, queries, top_k):
            assert top_k == 6
            return [[OTHER, CITY, CITY, RIVER]] * len(queries)

    found = run_probes(Material(QUESTIONS, episodes=EPISODES, retriever=Verbatim(), corpus=[CITY, RIVER]),
                       ["query_rewriting"])["query_rewriting"]  # fmt: skip
    assert values(found) == {
        "hit_first_round": round(1 / 6, 12),  # endless
        "hit_any_round": round(2 / 6, 12),  # straight, endless
        "query_copied": round(1 / 6, 12),  # hasty
        "hit_verbatim": 0.0,  # RIVER is the fourth of three
        "gain_over_verbatim": round(1 / 6, 12),
        "title_recall": round((1 + 0 + 0 + 0.5 + 1 + 0) / 6, 12),
        "passage_recall": round((1 + 0 + 0 + 0.5 + 1 + 0) / 6, 12),
        "without_gold": 0.0,
    }
    assert {entry["n"] for entry in found.values()} == {6}


def test_search_behaviour_by_hand():
    found = run_probes(Material(QUESTIONS, episodes=EPISODES), ["search_behaviour"])["search_behaviour"]
    sixth = round(1 / 6, 12)
    assert values(found) == {
        "num_searches": 1.0,  # 2, 0, 1, 1, 2, 0: the last search of endless was not executed
        "searches_0": round(2 / 6, 12),
        "searches_1": round(2 / 6, 12),
        "searches_2": round(2 / 6, 12),
        "malformed_fraction": round(4 / 15, 12),
        "repeated_query": sixth,  # endless
        "unanswered": round(2 / 6, 12),  # endless, silent
        "evidence_complete": round(2 / 6, 12),  # straight, endless
        "stopped_too_early": round(2 / 6, 12),  # no search, hasty
        "stopped_midway": sixth,  # halfway
        "searched_on": sixth,  # endless
        "extra_searches": -1.0,  # 0 - 2 - 1 - 1 + 0 - 2
        "without_gold": 0.0,
    }
    # Where one passage is as good as both, halfway has seen enough.
    enough = [replace(q, metadata={**q.metadata, "supporting_mode": "any"}) for q in QUESTIONS]
    found = run_probes(Material(enough, episodes=EPISODES), ["search_behaviour"])["search_behaviour"]
    assert values(found) | {"evidence_complete": 0.5, "stopped_midway": 0.0, "extra_searches": 0.0} == values(found)
    unknown = [Question(q.id, q.text, q.golden_answers) for q in QUESTIONS]
    found = run_probes(Material(unknown, episodes=EPISODES), ["search_behaviour"])["search_behaviour"]
    assert found["without_gold"]["value"] == 1
    assert not found.keys() & {"evidence_complete", "stopped_too_early", "searched_on", "extra_searches"}


def test_a_question_whose_search_fails_is_left_out_of_the_comparison_with_it():
    def search(queries, top_k):
        return [RetrieverError("gone") if number == 1 else [CITY, RIVER] for number, _ in enumerate(queries)]

    material = Material(QUESTIONS, episodes=EPISODES, retriever=SimpleNamespace(search=search))
    with pytest.warns(UserWarning, match="failed for 1 of 6 questions, .* the last one: gone"):
        found = run_probes(material, ["query_rewriting"])["query_rewriting"]
    assert (found["hit_verbatim"]["n"], found["hit_verbatim"]["value"]) == (5, 1)
    assert (found["gain_over_verbatim"]["n"], found["hit_first_round"]["n"]) == (5, 6)
    assert found["gain_over_verbatim"]["value"] == pytest.approx(1 / 5 - 1)  # of those left only endless hits


@pytest.mark.parametrize("probe", ["query_rewriting", "search_behaviour"])
def test_an_episode_whose_search_failed_is_left_out(probe):
    retriever = SimpleNamespace(search=lambda queries, top_k: [[RIVER]] * len(queries))

    def found(questions, episodes):
        return run_probes(Material(questions, episodes=episodes, retriever=retriever, corpus=[CITY]), [probe])[probe]

    failed = episode("down", ("search", "Ada", None))
    failed[-1]["error"] = "gone"
    down = replace(QUESTIONS[0], id="down", metadata={})
    expected = found(QUESTIONS, EPISODES) | {"search_failed": share([0] * 3 + [1] + [0] * 3)}
    assert found([*QUESTIONS[:3], down, *QUESTIONS[3:]], [*EPISODES[:3], failed, *EPISODES[3:]]) == expected
    assert found([down], [failed]) == {"search_failed": share([1])}


def test_evidence_counts_where_a_service_sends_no_ids():
    def renamed(one):
        passages = tuple(replace(passage, id=f"hash of {passage.id}") for passage in one["passages"])
        return one | {"passages": passages}

    probes = ["query_rewriting", "search_behaviour"]
    without_ids = [[renamed(info) for info in one] for one in EPISODES]
    found, expected = (
        run_probes(Material(QUESTIONS, episodes=episodes, corpus=[CITY, RIVER]), probes)
        for episodes in (without_ids, EPISODES)
    )
    assert found == expected


def test_passages_beyond_top_k_do_not_count():
    episodes = [episode("straight", ("search", "x", [OTHER, CITY, RIVER]), ("answer", "Tiber", None))]
    material = Material(QUESTIONS[:1], episodes=episodes, top_k=2)
    assert run_probes(material, ["query_rewriting"])["query_rewriting"]["hit_any_round"]["value"] == 0


# --- agents in the tiny world ----------------------------------------------------------------------------------------

CONFIG = TinyConfig(split="test", num_questions=60, num_passages=300)
WORLD, TINY = make_world(CONFIG), tiny(CONFIG)
BY_MESSAGE = {question.text + "\n": question for question in TINY}
STEPS = {q.id: WORLD.walk(q.metadata["subject"], q.metadata["chain"]) for q in TINY}
MAX_TURNS = 4


class Oracle:
    """Finds for `<subject> / <keyword>` the one passage that says it, and nothing else."""

    def __init__(self) -> None:
        passages = {passage.id: passage for passage in WORLD.corpus}
        self.facts = {f"{subject} / {keyword}": passages[i] for (keyword, subject), i in WORLD.passage_ids.items()}

    def search(self, queries, top_k):
        return [[self.facts[query]] if query in self.facts else [] for query in queries]


def perfect(prompt: Prompt) -> str:
    question = BY_MESSAGE[prompt.message]
    if prompt.opening.endswith("<answer>"):
        return f" {question.golden_answers[-1]} </answer>"
    if prompt.opening == "<think>":
        return f" easy </think><answer> {question.golden_answers[0]} </answer>"
    steps, done = STEPS[question.id], prompt.transcript.count("<search>")
    if done < len(steps):
        keyword, subject, _ = steps[done]
        return f"<think> next </think><search> {subject} / {keyword} </search>"
    return f"<answer> {question.golden_answers[0]} </answer>"


def measured(agent, retriever=None):
    """All figures of an agent, and its retriever."""
    envs = AgenticRAGVectorEnv(
        16, dataset=TINY, retriever=retriever or "bm25", max_turns=MAX_TURNS, autoreset_mode="Disabled"
    )

    def generate(prompts):
        return [agent(prompt) for prompt in prompts]

    material = Material(TINY, generate, play(generate, envs), envs.retriever, TINY.corpus)
    figures = run_probes(material, DEFAULT_PROBES)
    assert all(found["interval"][0] <= found["value"] <= found["interval"][1]
               for of in figures.values() for found in of.values())  # fmt: skip
    return {name: values(of) for name, of in figures.items()}, envs.retriever


def test_a_perfect_agent():
    found, _ = measured(perfect, Oracle())
    reading = found["source_referencing"]
    assert {name for name, value in reading.items() if value == 1} == {
        "exact_match", "f1", "alone_exact_match", "distractors_exact_match", "absent_searched",
        "position_1_exact_match", "position_2_exact_match", "position_3_exact_match",
    }  # fmt: skip
    assert set(reading.values()) == {0, 1}
    assert found["thinking"] == {
        "without_gold": 0, "exact_match": 1, "f1": 1, "gain": 0, "format_failures": 0, "searched": 0,
        "exact_match_well_formed": 1,
    }  # fmt: skip
    # Beyond one hop the first passage holds the answer only if the last value is the first subject or value again.
    first = [steps[-1][2] in steps[0][1:] for steps in STEPS.values()]
    assert found["query_rewriting"] == {
        "hit_first_round": round(sum(first) / 60, 12), "hit_any_round": 1, "query_copied": 0, "hit_verbatim": 0,
        "gain_over_verbatim": round(sum(first) / 60, 12), "title_recall": 1, "passage_recall": 1, "without_gold": 0,
    }  # fmt: skip
    assert found["search_behaviour"] == {
        "num_searches": 1.8, "searches_0": 0, "searches_1": 0.4, "searches_2": 0.4, "searches_3": 0.2,
        "malformed_fraction": 0, "repeated_query": 0, "unanswered": 0, "evidence_complete": 1, "stopped_too_early": 0,
        "stopped_midway": 0, "searched_on": 0, "extra_searches": 0, "without_gold": 0,
    }  # fmt: skip


def test_an_agent_that_never_searches():
    found, _ = measured(
        lambda prompt: f"{'' if prompt.opening.endswith('<answer>') else '<answer>'} Atlantis </answer>"
    )
    assert found["source_referencing"]["exact_match"] == 0
    assert found["source_referencing"]["format_failures"] == 0
    assert found["source_referencing"]["absent_invented"] == 1
    assert found["thinking"]["format_failures"] == 1
    rewriting, behaviour = found["query_rewriting"], found["search_behaviour"]
    for name in ("hit_first_round", "hit_any_round", "query_copied", "title_recall", "passage_recall"):
        assert rewriting[name] == 0
    assert rewriting["gain_over_verbatim"] == -rewriting["hit_verbatim"] < 0
    assert behaviour == {
        "num_searches": 0, "searches_0": 1, "malformed_fraction": 0, "repeated_query": 0, "unanswered": 0,
        "evidence_complete": 0, "stopped_too_early": 1, "stopped_midway": 0, "searched_on": 0, "extra_searches": -1.8,
        "without_gold": 0,
    }  # fmt: skip


def test_an_agent_that_copies_the_question():
    found, retriever = measured(lambda prompt: f"<search> {prompt.message.strip()} </search>")
    hits = evidence = titles_found = 0
    for question in TINY:
        (passages,) = retriever.search([question.text], 3)
        texts = [" ".join(re.findall(r"\w+", passage.contents.lower())) for passage in passages]
        hits += any(f" {answer.lower()} " in f" {text} " for answer in question.golden_answers for text in texts)
        evidence += len(set(question.metadata["supporting"]) & {p.id for p in passages}) / question.metadata["hops"]
        titles = {subject for _, subject, _ in STEPS[question.id]}
        titles_found += len(titles & {p.title for p in passages}) / len(titles)
    rewriting, behaviour = found["query_rewriting"], found["search_behaviour"]
    assert 0 < hits < 60
    assert rewriting == {
        "hit_first_round": round(hits / 60, 12), "hit_any_round": round(hits / 60, 12), "query_copied": 1,
        "hit_verbatim": round(hits / 60, 12), "gain_over_verbatim": 0, "without_gold": 0,
        "title_recall": pytest.approx(titles_found / 60), "passage_recall": pytest.approx(evidence / 60),
    }  # fmt: skip
    assert behaviour["num_searches"] == behaviour["searches_4"] * MAX_TURNS == MAX_TURNS
    assert behaviour["repeated_query"] == behaviour["unanswered"] == 1
    assert behaviour["stopped_too_early"] == behaviour["stopped_midway"] == behaviour["malformed_fraction"] == 0
    assert behaviour["evidence_complete"] == behaviour["searched_on"] > 0
    assert behaviour["extra_searches"] == pytest.approx(MAX_TURNS - 1.8)
    assert found["source_referencing"]["format_failures"] == found["source_referencing"]["absent_searched"] == 1


def test_an_agent_that_is_always_malformed():
    found, _ = measured(lambda prompt: "what?")
    assert found["source_referencing"]["format_failures"] == found["source_referencing"]["absent_malformed"] == 1
    assert found["thinking"]["format_failures"] == 1
    assert "exact_match_well_formed" not in found["thinking"]
    behaviour = found["search_behaviour"]
    assert behaviour["malformed_fraction"] == behaviour["unanswered"] == behaviour["searches_0"] == 1
    assert behaviour["stopped_too_early"] == behaviour["num_searches"] == 0
    assert found["query_rewriting"]["hit_any_round"] == 0


def test_an_episode_without_room_for_another_turn_ends_so():
    """It counted as turns without any words, up to the last one."""

    def generate(prompts):
        return [None if prompt.transcript else "<search> river </search>" for prompt in prompts]

    envs = AgenticRAGVectorEnv(2, dataset=TINY, retriever="bm25", autoreset_mode="Disabled")
    episodes = play(generate, envs, 3)
    assert [[(info["action"], info["ending"]) for info in one] for one in episodes] == [
        [("search", Ending.OUT_OF_TOKENS)]
    ] * 3
    episodes = play(lambda prompts: [None] * len(prompts), envs, 1)
    assert [(info["action"], info["ending"]) for info in episodes[0]] == [("malformed", Ending.OUT_OF_TOKENS)]


def test_playing_continues_from_the_cut_turn_and_keeps_the_order():
    seen = {}

    def generate(prompts):
        for prompt in prompts:
            seen.setdefault(prompt.message, []).append(prompt)
        return [perfect(prompt) + " and then some" for prompt in prompts]

    envs = AgenticRAGVectorEnv(7, dataset=TINY, retriever=Oracle(), autoreset_mode="Disabled")
    episodes = play(generate, envs, 20)
    assert [infos[0]["question_id"] for infos in episodes] == [question.id for question in TINY[:20]]
    assert all(infos[-1]["correct"] for infos in episodes)
    for prompts in seen.values():
        for earlier, later in pairwise(prompts):
            assert later.startswith(earlier)
            assert later.transcript.endswith("</information>\n\n")
            assert "and then some" not in later
    with pytest.raises(ConfigurationError, match="autoreset_mode='Disabled'"):
        play(generate, AgenticRAGVectorEnv(2, dataset=TINY))


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_what_is_lacking_or_does_not_fit_is_a_clear_error():
    assert set(DEFAULT_PROBES) <= set(PROBES.names())
    envs = SimpleNamespace(dataset=QuestionSet("few", READING))
    cases = [
        (Material(envs.dataset), "thinking", "has no 'generate'"),
        (Material(READING, lambda prompts: ["x"]), "thinking", "returned 1 texts for 4 prompts"),
        (Material(READING), "query_rewriting", "the material has none"),
        (Material(QUESTIONS, episodes=EPISODES[:2]), "search_behaviour", "got 2 episodes for 6 questions"),
        (
            Material(QUESTIONS[::-1], episodes=EPISODES),
            "search_behaviour",
            "'straight' stands in the place of 'silent'",
        ),
        (Material(READING), {"name": "source_referencing", "num_distractors": 0}, "at least 1, got 0"),
        (Material(READING), {"name": "source_referencing", "distractors": 1}, "no setting 'distractors'"),
    ]
    for material, probe, said in cases:
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            run_probes(material, [probe])
    with pytest.raises(ConfigurationError, match="'search_behaviour' is named twice"):
        run_probes(Material(QUESTIONS, episodes=EPISODES), ["search_behaviour", {"name": "search_behaviour"}])
    with pytest.raises(UnknownNameError, match="Did you mean 'thinking'"):
        run_probes(Material(READING), ["thinkin"])


# --- endpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """An OpenAI-compatible server whose reply is a function of the request: (status, body)."""
    fake = SimpleNamespace(requests=[], reply=None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append((self.path, body, self.headers.get("Authorization")))
            status, reply = fake.reply(body)
            payload = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    yield fake
    running.shutdown()
    running.server_close()


def endpoint(server, **settings) -> Endpoint:
    return Endpoint(EndpointConfig(server.url, "m", backoff_s=0.0, api_key_variable="A_KEY_FOR_TESTS", **settings))


def test_completions_keep_the_order_and_are_cut_at_the_closing_tag(server, monkeypatch):
    monkeypatch.setenv("A_KEY_FOR_TESTS", "secret")
    server.reply = lambda body: (200, {"choices": [{"text": f" {body['prompt']}</answer> and on"}]})
    texts = endpoint(server, max_tokens=7)([Prompt(f"q{row}", " t", "<answer>") for row in range(20)])
    assert texts == [f" q{row} t<answer></answer>" for row in range(20)]
    path, body, key = server.requests[0]
    assert path == "/v1/completions"
    assert body == {"model": "m", "max_tokens": 7, "temperature": 0.0, "prompt": body["prompt"]}
    assert key == "Bearer secret"


def test_chat_continues_the_beginning_of_the_reply(server):
    server.reply = lambda body: (200, {"choices": [{"message": {"content": "fine"}}]})
    assert endpoint(server, api="chat")([Prompt("q", " t", "<think>"), "plain"]) == ["fine", "fine"]
    bodies = {body["messages"][0]["content"]: body for _, body, _ in server.requests}
    assert bodies["q"]["messages"][1:] == [{"role": "assistant", "content": " t<think>"}]
    assert bodies["q"]["continue_final_message"] is True
    assert bodies["q"]["add_generation_prompt"] is False
    assert bodies["plain"]["messages"] == [{"role": "user", "content": "plain"}]
    assert "continue_final_message" not in bodies["plain"]
    assert server.requests[0][0] == "/v1/chat/completions"
    assert server.requests[0][2] is None


def test_an_endpoint_is_asked_again_only_where_that_may_help(server):
    replies = [(503, b"busy"), (429, b"slow down"), (200, {"choices": [{"text": "at last"}]})]
    server.reply = lambda body: replies.pop(0)
    assert endpoint(server)(["q"]) == ["at last"]
    for reply, said, tries in (
        ((400, b"no such model"), "after 1 try: status 400: no such model", 1),
        ((500, b"broken"), "after 3 tries: status 500: broken", 3),
        ((200, b"<html>"), "is not JSON: '<html>'", 1),
        ((200, {"choices": []}), "holds no text", 1),
        ((200, {"choices": [{"text": 5}]}), "holds no text", 1),
        ((200, b"null"), "holds no text: None", 1),
        ((200, b'"fine"'), "holds no text: fine", 1),
        ((200, b"[" * 100_000), "is not JSON", 1),
        ((408, b"too slow"), "after 3 tries: status 408: too slow", 3),
    ):
        server.requests.clear()
        server.reply = lambda body, reply=reply: reply
        with pytest.raises(EndpointError, match=re.escape(said)):
            endpoint(server, max_retries=2)(["q"])
        assert len(server.requests) == tries


@pytest.mark.parametrize(
    "said",
    [
        {"object": "error", "message": "This model's maximum context length is 4096 tokens. However, .."},
        {"error": {"code": "context_length_exceeded", "message": "too long"}},
        {"error": {"type": "exceed_context_size_error", "message": "the request exceeds the available context size"}},
    ],
)
def test_a_prompt_that_is_too_long_for_the_model_has_no_text(server, said):
    server.reply = lambda body: (400, said) if body["prompt"] == "long" else (200, {"choices": [{"text": "fine"}]})
    assert endpoint(server)(["short", "long"]) == ["fine", None]


def test_half_of_a_surrogate_pair_is_no_text_of_a_request(server):
    server.reply = lambda body: (200, b'{"choices": [{"text": "so \\ud83d"}]}')
    asked = endpoint(server)
    assert asked(asked(["\udc80"])) == ["so ?"]
    assert [body["prompt"] for _, body, _ in server.requests] == ["?", "so ?"]


def test_parts_of_a_reply_are_joined(server):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "in "}, {"type": "text", "text": "two"}]
    server.reply = lambda body: (200, {"choices": [{"message": {"content": parts}}]})
    assert endpoint(server, api="chat")(["q"]) == ["in two"]


@pytest.mark.parametrize(("key", "sent"), [("secret\r\n", "Bearer secret"), (" ", None)])
def test_blanks_around_a_key_are_no_part_of_it(server, monkeypatch, key, sent):
    monkeypatch.setenv("A_KEY_FOR_TESTS", key)
    server.reply = lambda body: (200, {"choices": [{"text": "fine"}]})
    endpoint(server)(["q"])
    assert server.requests[0][2] == sent


@pytest.mark.parametrize("key", ["sec\rret", "sécret"])
def test_a_key_that_no_request_can_carry_is_refused_and_never_shown(server, monkeypatch, key):
    monkeypatch.setenv("A_KEY_FOR_TESTS", key)
    with pytest.raises(ConfigurationError, match="The key in the variable A_KEY_FOR_TESTS holds") as refused:
        endpoint(server)
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api": "chats"}, "Did you mean 'chat'"),
        ({"url": "localhost:8000"}, "url must be an address such as http"),
        ({"num_parallel": 0}, "num_parallel must be an integer of at least 1, got 0"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
    ],
)
def test_settings_of_an_endpoint_that_cannot_work(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        EndpointConfig(**{"url": "http://localhost/v1", "model": "m"} | settings)
