"""The tiny world is what its docstring says: consistent, fresh for every split, and solved by searching only."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from agentic_rag_env import rewards
from agentic_rag_env.datasets.tiny import CHAINS, RELATIONS, TinyConfig, make_world, tiny
from agentic_rag_env.datasets.tiny_names import POOLS, entity_name
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever

# Written by hand, so that a change of the templates that breaks their meaning is noticed.
SENTENCES = {
    "born": r"(?P<s>.+) was born in (?P<v>.+)\.|(?P<v2>.+) is where (?P<s2>.+) was born\.",
    "lives": r"(?P<s>.+) lives in (?P<v>.+)\.|(?P<v2>.+) is where (?P<s2>.+) lives\.",
    "works": r"(?P<s>.+) works at (?P<v>.+)\.|(?P<v2>.+) is where (?P<s2>.+) works\.",
    "profession": r"(?P<s>.+) is a (?P<v>.+) by profession\.|The profession of (?P<s2>.+) is (?P<v2>.+)\.",
    "plays": r"(?P<s>.+) plays the (?P<v>.+)\.|The (?P<v2>.+) is what (?P<s2>.+) plays\.",
    "based": r"(?P<s>.+) is based in (?P<v>.+)\.|(?P<v2>.+) is where (?P<s2>.+) is based\.",
    "founder": r"(?P<s>.+) has (?P<v>.+) as founder\.|(?P<v2>.+) is the founder of (?P<s2>.+)\.",
    "sells": r"(?P<s>.+) sells (?P<v>.+)\.|(?P<v2>.+) are what (?P<s2>.+) sells\.",
    "country": r"(?P<s>.+) is in the country (?P<v>.+)\.|(?P<v2>.+) is the country of (?P<s2>.+)\.",
    "river": r"(?P<s>.+) lies on the river (?P<v>.+)\.|The river (?P<v2>.+) flows through (?P<s2>.+)\.",
    "author": r"(?P<s>.+) has (?P<v>.+) as author\.|(?P<v2>.+) is the author of (?P<s2>.+)\.",
    "genre": r"(?P<s>.+) is of the (?P<v>.+) genre\.|The genre of (?P<s2>.+) is (?P<v2>.+)\.",
}


def read_facts(corpus) -> dict[tuple[str, str], str]:
    facts = {}
    for passage in corpus:
        for keyword, pattern in SENTENCES.items():
            if found := re.fullmatch(pattern, passage.text):
                groups = found.groupdict()
                facts[keyword, groups["s"] or groups["s2"]] = groups["v"] or groups["v2"]
    return facts


@pytest.fixture(scope="module", params=["train", "dev", "test"])
def dataset(request):
    return tiny(TinyConfig(split=request.param))


def test_answers_follow_from_the_passages_alone(dataset):
    facts = read_facts(dataset.corpus)
    for question in dataset:
        entity = question.metadata["subject"]
        assert entity in question.text
        for keyword in question.metadata["chain"]:
            entity = facts[keyword, entity]
        assert question.golden_answers[0] == entity


def test_gold_passages_state_the_facts_of_the_chain_in_order(dataset):
    by_id = {passage.id: passage for passage in dataset.corpus}
    for question in dataset:
        entity = question.metadata["subject"]
        assert len(question.metadata["supporting"]) == question.metadata["hops"] == len(question.metadata["chain"])
        for passage_id, keyword in zip(question.metadata["supporting"], question.metadata["chain"], strict=True):
            ((found, subject), value) = next(iter(read_facts([by_id[passage_id]]).items()))
            assert (found, subject) == (keyword, entity)
            entity = value


def test_shares_subsets_and_distinct_ids(dataset):
    hops = Counter(question.metadata["hops"] for question in dataset)
    assert hops == {1: 800, 2: 800, 3: 400}
    assert len({question.id for question in dataset}) == 2000
    assert {question.metadata["dataset"] for question in dataset if question.metadata["hops"] > 1} == {"multi_hop"}
    single = tiny(TinyConfig(subset="single_hop", num_questions=50))
    multi = tiny(TinyConfig(subset="multi_hop", num_questions=50))
    assert {question.metadata["hops"] for question in single} == {1}
    assert {question.metadata["hops"] for question in multi} == {2, 3}


@pytest.mark.parametrize("num_questions", [1, 2, 3, 4, 7, 60])
@pytest.mark.parametrize("subset", ["all", "multi_hop"])
def test_as_many_questions_as_asked_for(num_questions, subset):
    assert len(tiny(TinyConfig(subset=subset, num_questions=num_questions))) == num_questions


def test_same_seed_same_world_other_seed_other_facts():
    first, again, other = (make_world(TinyConfig(seed=seed)) for seed in (0, 0, 1))
    assert first.facts == again.facts
    assert [passage.contents for passage in first.corpus] == [passage.contents for passage in again.corpus]
    assert first.facts != other.facts
    assert make_world(TinyConfig(num_questions=5)).facts == first.facts


def test_what_was_true_in_training_is_worth_nothing_in_the_test():
    known = make_world(TinyConfig(split="train"))
    right = total = 0
    for question in tiny(TinyConfig(split="test")):
        subject, chain = question.metadata["subject"], question.metadata["chain"]
        if subject in known.facts[chain[0]]:
            answer = known.walk(subject, chain)[-1][2]
            right += rewards.exact_match(answer, question.golden_answers)
            total += 1
    assert total > 1000
    assert right / total < 0.06


def test_a_query_must_name_the_relation():
    world = make_world(TinyConfig())
    retriever = BM25Retriever(BM25Config(), world.corpus)
    facts = [(keyword, subject) for keyword, values in world.facts.items() for subject in values]
    recall = {}
    for name, query in (("both", "{s} {k}"), ("entity", "{s}")):
        results = retriever.search([query.format(s=subject, k=keyword) for keyword, subject in facts], 3)
        found = [world.passage_ids[fact] in {p.id for p in row} for fact, row in zip(facts, results, strict=True)]
        recall[name] = sum(found) / len(found)
    assert recall["both"] > 0.99
    assert recall["entity"] < 0.8
    people = [fact for fact in facts if RELATIONS[fact[0]].subject == "person"]
    results = retriever.search([subject for _, subject in people], 3)
    found = [world.passage_ids[fact] in {p.id for p in row} for fact, row in zip(people, results, strict=True)]
    assert sum(found) / len(found) < 0.7


def test_aliases_are_accepted_and_written_down():
    dataset = tiny(TinyConfig())
    world = make_world(TinyConfig())
    assert len(world.aliases) >= 20
    texts = {passage.text for passage in dataset.corpus}
    for name, alias in world.aliases.items():
        assert f"{name} is also called {alias}." in texts
        assert world.golden_answers(name) == (name, alias)
    aliased = [question for question in dataset if len(question.golden_answers) == 2]
    assert aliased
    assert rewards.exact_match(aliased[0].golden_answers[1], aliased[0].golden_answers) == 1.0


def test_names_are_unique_and_some_are_not_ascii():
    names = [name for pool in POOLS.values() for name in pool]
    assert len(names) == len(set(names))
    assert all(" " not in name for name in names)
    assert sum(not name.isascii() for name in names) > 30
    many = [entity_name("person", index) for index in range(20_000)]
    assert len(set(many)) == 20_000
    assert many[:128] == list(POOLS["person"])


@pytest.mark.parametrize("num_passages", [100, 1000, 20_000])
def test_size_is_a_parameter(num_passages):
    world = make_world(TinyConfig(num_passages=num_passages))
    assert 0.85 * num_passages < len(world.corpus) < 1.15 * num_passages
    assert len({passage.id for passage in world.corpus}) == len(world.corpus)


@pytest.mark.nightly
def test_a_million_passages():
    world = make_world(TinyConfig(num_passages=1_000_000))
    assert 0.85e6 < len(world.corpus) < 1.15e6


def test_every_chain_fits_together():
    for hops, chains in CHAINS.items():
        for chain in chains:
            assert len(chain) == hops
            for first, second in itertools.pairwise(chain):
                assert RELATIONS[first].value == RELATIONS[second].subject


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tests"}, "Did you mean 'test'"),
        ({"subset": "hard"}, "single_hop"),
        ({"num_passages": 99}, r"\[100, 1000000\], got 99"),
        ({"num_questions": 0}, "at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        TinyConfig(**settings)
