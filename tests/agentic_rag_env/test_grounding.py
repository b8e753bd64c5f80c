"""Whether an agent reads or remembers: scripted agents of either kind get the figures that they must get."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from agentic_rag_env.answers import holds_answer
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.probes import Material, play, run_probes
from agentic_rag_env.probes.grounding import Misplaced, answer_kind, change
from agentic_rag_env.registry import DATASETS, RETRIEVERS
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.rewards import normalize_answer
from agentic_rag_env.types import Passage, Question
from agentic_rag_env.vector import AgenticRAGVectorEnv

LANDS = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo"}


def world() -> QuestionSet:
    questions = [
        Question(land, f"What is the capital of {land}?", (city,), {"supporting": (land,)})
        for land, city in LANDS.items()
    ]
    questions.append(Question("yes", "Is Paris in France?", ("yes",), {"supporting": ("France",)}))
    passages = [Passage(land, f"{land}\n{city} is the capital of {land}.") for land, city in LANDS.items()]
    return QuestionSet("capitals", questions, passages)


def gold_as(field: str) -> QuestionSet:
    """The world with its gold passages in another field, in which they have no ids."""
    dataset = world()
    items = {
        passage.id: {
            "gold_passages": passage.contents,
            "paragraphs": {"title": passage.title, "paragraph_text": f"{passage.text}\n", "is_supporting": True},
            "positive_ctxs": {"title": passage.title, "text": passage.text},
        }[field]
        for passage in dataset.corpus
    }
    questions = [replace(one, metadata={field: [items[one.metadata["supporting"][0]]]}) for one in dataset.questions]
    return QuestionSet("capitals", questions, dataset.corpus)


def unchanged(retriever):
    return retriever


class Renaming:
    """A service that sends no ids, so that passages have other ones than in the corpus."""

    def __init__(self, retriever):
        self.retriever = retriever

    def search(self, queries, top_k):
        found = self.retriever.search(queries, top_k)
        return [[replace(one, id=f"hash of {one.id}") for one in passages] for passages in found]


def reader(prompts):
    """Searches the question, then answers with what the first passage says."""
    texts = []
    for prompt in prompts:
        found = re.search(r"\) (\w+) is the capital", prompt)
        land = re.search(r"capital of (\w+)", prompt)
        query = f"<search> capital of {land[1]} </search>" if land else "<search> nothing </search>"
        texts.append(f"<answer> {found[1]} </answer>" if found else query)
    return texts


def rememberer(prompts):
    """Answers what it knows, whatever it reads."""
    lands = [re.search(r"capital of (\w+)", prompt) for prompt in prompts]
    return [f"<answer> {LANDS[land[1]] if land else 'yes'} </answer>" for land in lands]


def material(generate, dataset=None, around=unchanged) -> Material:
    dataset = dataset or world()
    retriever = around(BM25Retriever(BM25Config(), corpus=dataset.corpus))
    envs = AgenticRAGVectorEnv(4, dataset=dataset, retriever=retriever, top_k=1, autoreset_mode="Disabled")
    return Material(dataset.questions, generate, play(generate, envs), retriever, dataset.corpus, top_k=1, envs=envs)


def values(figures):
    return {name: figure["value"] for name, figure in figures.items()}


@pytest.mark.parametrize(
    ("dataset", "around"),
    [
        (world(), unchanged),
        (gold_as("gold_passages"), unchanged),
        (gold_as("paragraphs"), unchanged),
        (gold_as("positive_ctxs"), unchanged),
        (world(), Renaming),
    ],
    ids=["supporting", "gold_passages", "paragraphs", "positive_ctxs", "service without ids"],
)
def test_an_agent_that_reads_answers_what_the_passages_say_now(dataset, around):
    figures = run_probes(material(reader, dataset, around), ["counterfactual"])["counterfactual"]
    assert values(figures) == {
        "left_out": pytest.approx(1 / 7),  # the question that yes answers
        "reads": 1.0,
        "remembers": 0.0,
        "neither": 0.0,
        "shown": 1.0,
        "own_exact_match": 1.0,
    }
    assert figures["reads"]["n"] == 6
    assert (figures["reads"]["best"], figures["remembers"]["best"]) == ("high", "low")


def test_a_search_that_fails_ends_its_own_episode_alone():
    """As in training: the probes of a flaky service lose the episodes whose search failed, and no others."""
    dataset = world()
    faulty = RETRIEVERS.build(
        {"name": "faulty", "retriever": "bm25", "error_fraction": 0.3, "seed": 1}, corpus=dataset.corpus
    )
    envs = AgenticRAGVectorEnv(4, dataset=dataset, retriever=faulty, top_k=1, autoreset_mode="Disabled")
    one = Material(dataset.questions, reader, play(reader, envs), faulty, dataset.corpus, top_k=1, envs=envs)
    figures = run_probes(one, ["counterfactual", "shuffled"])
    changed = figures["counterfactual"]
    assert (changed["reads"]["value"], changed["neither"]["value"]) == (1.0, 0.0), "no failed search is misread text"
    assert 0 < changed["search_failed"]["value"] < 1
    assert changed["reads"]["n"] == round(6 * (1 - changed["search_failed"]["value"]))
    assert one.any_search_failed, "so that these figures are not kept"


def test_shuffled_figures_are_over_the_episodes_whose_search_worked():
    dataset = world()

    class Failing(Renaming):
        def search(self, queries, top_k):
            found = self.retriever.search(queries, top_k)
            return [
                RetrieverError("gone") if query == dataset.questions[-1].text else passages
                for query, passages in zip(queries, found, strict=True)
            ]

    one = material(reader, dataset, Failing)
    one.seed = 2  # by it the seventh query gets what another question finds
    shuffled = run_probes(one, ["shuffled"])["shuffled"]
    assert shuffled["search_failed"]["value"] == pytest.approx(6 / 7)  # what the queries about capitals find instead
    assert {shuffled[name]["n"] for name in ("exact_match", "closed_book_exact_match", "own_exact_match")} == {1}
    assert one.any_search_failed


def test_own_figures_are_over_the_episodes_whose_own_search_worked():
    one = material(reader)
    one.episodes[0][-1] |= {"error": "gone", "correct": False, "ending": None}
    for probe, count in (("counterfactual", 5), ("shuffled", 6)):
        own = run_probes(one, [probe])[probe]["own_exact_match"]
        assert (own["value"], own["n"]) == (1.0 if probe == "counterfactual" else pytest.approx(5 / 6), count)


def test_a_dead_search_leaves_only_its_share():
    dataset = world()
    dead = RETRIEVERS.build({"name": "faulty", "retriever": "bm25", "error_fraction": 1.0}, corpus=dataset.corpus)
    one = Material(dataset.questions, reader, None, dead, dataset.corpus, top_k=1)
    figures = run_probes(one, ["counterfactual", "shuffled"])
    assert values(figures["counterfactual"]) == {"left_out": pytest.approx(1 / 7), "search_failed": 1.0}
    assert values(figures["shuffled"]) == {"search_failed": 1.0}


def test_an_agent_that_remembers_gets_the_opposite():
    figures = run_probes(material(rememberer), ["counterfactual"])["counterfactual"]
    assert values(figures) == {
        "left_out": pytest.approx(1 / 7),
        "reads": 0.0,
        "remembers": 1.0,
        "neither": 0.0,
        "shown": 0.0,  # it never searches
        "own_exact_match": 1.0,
    }


def test_an_old_answer_that_another_passage_shows_is_no_memory():
    """Then it may have been read."""
    dataset = world()
    passages = [
        *dataset.corpus,
        Passage("list", "capital of France\nParis is the capital of France, capital of France"),
    ]
    seen = material(reader, QuestionSet("capitals", dataset.questions, passages))
    figures = values(run_probes(seen, [{"name": "counterfactual", "num_questions": 1}])["counterfactual"])
    assert (figures["reads"], figures["remembers"], figures["neither"], figures["shown"]) == (0.0, 0.0, 1.0, 0.0)


def test_shuffled_passages_take_a_reader_to_the_closed_book():
    figures = values(run_probes(material(reader), [{"name": "shuffled", "num_questions": 6}])["shuffled"])
    assert figures == {"exact_match": 0.0, "closed_book_exact_match": 0.0, "own_exact_match": 1.0}
    figures = values(run_probes(material(rememberer), [{"name": "shuffled", "num_questions": 6}])["shuffled"])
    assert figures["exact_match"] == 1.0


def test_each_new_answer_is_of_the_same_type_and_stands_in_the_passages():
    dataset = DATASETS.build({"name": "tiny", "split": "test", "num_questions": 300})
    asked = Material(dataset.questions, corpus=dataset.corpus, seed=3)
    changes = change(asked)
    assert len(changes) > 100
    by_id, altered = {passage.id: passage for passage in dataset.corpus}, {}
    for one in changes:
        question = dataset[one.number]
        assert one.answer in {
            other.golden_answers[0] for other in dataset if answer_kind(other) == answer_kind(question)
        }
        for passage in one.passages.values():
            assert holds_answer(by_id[passage.id].contents, question.golden_answers)
            assert holds_answer(passage.contents, [one.answer])
            assert not holds_answer(passage.contents, question.golden_answers)
            assert altered.setdefault(passage.id, passage) == passage, "two questions agree on a passage"
    for one in changes:
        kept = set(dataset[one.number].metadata["supporting"]) - {passage.id for passage in one.passages.values()}
        assert not kept & altered.keys(), "what leads to the answer is as it was"
    assert [one.answer for one in change(Material(dataset.questions, corpus=dataset.corpus, seed=3))] == [
        one.answer for one in changes
    ]
    assert [one.answer for one in change(Material(dataset.questions, corpus=dataset.corpus, seed=4))] != [
        one.answer for one in changes
    ]


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("He won 5 races of 3.5 miles before 5,000 people", "5", "seven",
         "He won seven races of 3.5 miles before 5,000 people"),
        ("It was 5. At 5:30, 5, then", "5", "seven", "It was seven. At 5:30, seven, then"),
        ("1.Paris, 2:Paris.", "Paris", "Rome", "1.Rome, 2:Rome."),
        ("北京是中国的首都。", "北京", "上海", "上海是中国的首都。"),
        ("在1969年Paris的11969", "1969", "1920", "在1920年Paris的11969"),
        ("東京のParisParis", "東京", "大阪", "大阪のParisParis"),
        ("It is the A, a letter", "A", "B", None),  # an answer that normalization empties stands nowhere
    ],
)  # fmt: skip
def test_only_the_answer_is_replaced(text, old, new, expected):
    questions = [
        Question("q", "Which?", (old, ""), {"gold_passages": [f"Title\n{text}"], "answer_type": "any"}),
        Question("other", "What?", (new,), {"answer_type": "any"}),
    ]
    changed = [passage.text for one in change(Material(questions)) for passage in one.passages.values()]
    assert changed == ([] if expected is None else [expected])


@pytest.mark.parametrize("turned", [False, True])
def test_no_new_answer_stands_in_the_question_already_whichever_comes_first(turned):
    bastille = Passage("Bastille", "Bastille\nThe Bastille stood in Paris.")
    corpus = [*(passage for passage in world().corpus if passage.id in ("France", "Italy")), bastille]
    questions = [
        *world().questions[:2],
        Question("c", "Did the Bastille stand in Paris, Rome or Milan?", ("Paris",), {"supporting": ["Bastille"]}),
    ]
    questions = questions[::-1] if turned else questions
    found = {questions[one.number].id: one.answer for one in change(Material(questions, corpus=corpus))}
    assert found == {"France": "Rome", "Italy": "Paris"}, "nothing can take the place of Paris in the third"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("yes", None), ("No.", None), ("1969", "year"), ("July 20, 1969", "date"), ("May 2001", "date"),
        ("42", "number"), ("three million", "number"), ("Ada Lovelace", "name"), ("May", "name"), ("3,000", "number"),
    ],
)  # fmt: skip
def test_types_of_answers(answer, kind):
    assert answer_kind(Question("q", "?", (answer,))) == kind
    assert answer_kind(Question("q", "?", (answer,), {"answer_type": "place"})) == "place"


def test_a_query_is_answered_with_what_another_question_finds():
    dataset = world()
    retriever = Misplaced(BM25Retriever(BM25Config(), corpus=dataset.corpus), dataset.questions, 0)
    for land in LANDS:
        (found,) = retriever.search([f"{land} city"], 1)
        assert normalize_answer(found[0].title) != normalize_answer(land)
    with pytest.raises(ConfigurationError, match="at least 2 questions, got 1"):
        Misplaced(retriever, dataset.questions[:1], 0)


def test_characters_of_unspaced_scripts_are_the_words_that_questions_share():
    texts = ("法国的首都是哪里？", "谁写了红楼梦？")
    questions = [Question(text, text, ("?",)) for text in texts]
    searched = SimpleNamespace(search=lambda queries, top_k: queries)
    for seed in range(4):
        assert Misplaced(searched, questions, seed).search(["法国首都", "红楼梦"], 1) == [texts[1], texts[0]]


def test_what_is_missing_is_named():
    dataset = world()
    with pytest.raises(ConfigurationError, match="no 'retriever'"):
        run_probes(Material(dataset.questions, reader, corpus=dataset.corpus), ["shuffled"])
