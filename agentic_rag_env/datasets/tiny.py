"""The bundled tiny world: a made-up encyclopedia and questions about it that only searching can answer.

People, cities, companies, works and countries stand in functional relations to each other. Each fact is one passage.
Each question follows one, two or three relations from an entity. All facts are drawn anew for every seed and split,
while the names stay the same. So what was true in training says nothing about the test, and an agent has to search.
People have five facts and are mentioned in others, so a query must name the relation that it is after.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.tiny_names import POOLS, entity_name
from agentic_rag_env.registry import DATASETS
from agentic_rag_env.settings import COUNT, check_settings, one_of, within
from agentic_rag_env.types import Passage, Question

SPLITS = ("train", "dev", "test")
SUBSETS = ("all", "single_hop", "multi_hop")


class Relation(NamedTuple):
    """A function from entities of one kind to entities of another.

    Attributes:
        keyword: The word that every passage about it contains; a good query names it.
        subject, value: The kinds of entity that it leads from and to.
        passages: Phrasings of a fact.
        phrases: Phrasings of "the value of the subject" in a question.
    """

    keyword: str
    subject: str
    value: str
    passages: tuple[str, ...]
    phrases: tuple[str, ...]


RELATIONS = {
    relation.keyword: relation
    for relation in (
        Relation("born", "person", "city", ("{s} was born in {v}.", "{v} is where {s} was born."),
                 ("the birthplace of {s}", "the city where {s} was born")),
        Relation("lives", "person", "city", ("{s} lives in {v}.", "{v} is where {s} lives."),
                 ("the home of {s}", "the city where {s} lives")),
        Relation("works", "person", "company", ("{s} works at {v}.", "{v} is where {s} works."),
                 ("the employer of {s}", "the company where {s} works")),
        Relation("profession", "person", "profession",
                 ("{s} is a {v} by profession.", "The profession of {s} is {v}."),
                 ("the profession of {s}", "the job of {s}")),
        Relation("plays", "person", "instrument", ("{s} plays the {v}.", "The {v} is what {s} plays."),
                 ("the instrument of {s}", "the instrument that {s} plays")),
        Relation("based", "company", "city", ("{s} is based in {v}.", "{v} is where {s} is based."),
                 ("the seat of {s}", "the city where {s} is based")),
        Relation("founder", "company", "person", ("{s} has {v} as founder.", "{v} is the founder of {s}."),
                 ("the founder of {s}", "the person who started {s}")),
        Relation("sells", "company", "product", ("{s} sells {v}.", "{v} are what {s} sells."),
                 ("the product of {s}", "the product that {s} sells")),
        Relation("country", "city", "country", ("{s} is in the country {v}.", "{v} is the country of {s}."),
                 ("the country of {s}", "the nation of {s}")),
        Relation("river", "city", "river", ("{s} lies on the river {v}.", "The river {v} flows through {s}."),
                 ("the river of {s}", "the river that flows through {s}")),
        Relation("author", "work", "person", ("{s} has {v} as author.", "{v} is the author of {s}."),
                 ("the author of {s}", "the person who wrote {s}")),
        Relation("genre", "work", "genre", ("{s} is of the {v} genre.", "The genre of {s} is {v}."),
                 ("the genre of {s}", "the literary kind of {s}")),
    )
}  # fmt: skip

ALIAS_PASSAGE = "{s} is also called {v}."
OPENINGS = ("What is {phrase}?", "Can you name {phrase}?", "Do you know {phrase}?")

#: Chains of relations by number of hops, in the order in which an agent looks them up.
CHAINS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: tuple((keyword,) for keyword in RELATIONS),
    2: (("born", "country"), ("lives", "river"), ("works", "based"), ("works", "founder"), ("works", "sells"),
        ("based", "country"), ("founder", "born"), ("author", "works"), ("author", "plays"), ("author", "lives")),
    3: (("works", "based", "country"), ("works", "founder", "lives"), ("author", "born", "country"),
        ("author", "works", "sells"), ("founder", "lives", "river"), ("founder", "born", "country")),
}  # fmt: skip
_HOP_SHARES = {1: 0.4, 2: 0.4, 3: 0.2}

#: Number of entities per passage of the whole world; the fixed kinds have as many as their pools hold.
_ENTITIES_PER_PASSAGE = {"person": 0.115, "city": 0.05, "company": 0.05, "work": 0.045}
_ALIASED_SHARE = 0.125


@dataclass
class TinyConfig:
    """Settings of the tiny world.

    Attributes:
        split: "train", "dev" or "test"; each is a world of its own with facts of its own.
        subset: "all", "single_hop" (like NQ) or "multi_hop" (like MuSiQue).
        num_questions: Most questions drawn: 40 % with one hop, 40 % with two, 20 % with three.
        num_passages: Approximate number of passages, 100 to 1,000,000. Beyond about 1,100 names have several words.
        seed: Each seed gives another set of three worlds.
    """

    split: str = "train"
    subset: str = "all"
    num_questions: int = 2000
    num_passages: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, one_of(SPLITS), "split")
        check_settings(self, one_of(SUBSETS), "subset")
        check_settings(self, within(100, 1_000_000), "num_passages")
        check_settings(self, COUNT, "num_questions")


class World:
    """All entities and facts of one world.

    Args:
        num_passages: Approximate number of passages.
        rng: Source of all randomness.

    Attributes:
        entities: Names by kind.
        facts: `facts[keyword][subject]` is the value's name.
        aliases: Nickname by name.
        corpus: One passage per fact or alias, in random order.
        passage_ids: `passage_ids[keyword, subject]` is the id of the fact's passage.
    """

    def __init__(self, num_passages: int, rng: np.random.Generator) -> None:
        self.entities = {kind: self._draw_names(kind, num_passages, rng) for kind in POOLS if kind != "nickname"}
        self.facts = {
            relation.keyword: dict(
                zip(
                    self.entities[relation.subject],
                    rng.choice(self.entities[relation.value], len(self.entities[relation.subject])).tolist(),
                    strict=True,
                )
            )
            for relation in RELATIONS.values()
        }
        self.aliases = self._draw_aliases(rng)
        self.corpus: list[Passage] = []
        self.passage_ids: dict[tuple[str, str], str] = {}
        self._write_passages(rng)

    @staticmethod
    def _draw_names(kind: str, num_passages: int, rng: np.random.Generator) -> list[str]:
        pool_size = len(POOLS[kind])
        if kind not in _ENTITIES_PER_PASSAGE:
            return [entity_name(kind, index) for index in rng.permutation(pool_size)]
        count = max(4, round(_ENTITIES_PER_PASSAGE[kind] * num_passages))
        return [entity_name(kind, int(index)) for index in rng.permutation(max(count, pool_size))[:count]]

    def _draw_aliases(self, rng: np.random.Generator) -> dict[str, str]:
        named = [name for kind in ("person", "city", "company") for name in self.entities[kind]]
        count = min(round(_ALIASED_SHARE * len(named)), len(named))
        chosen = rng.permutation(len(named))[:count]
        nicknames = rng.permutation(max(count, len(POOLS["nickname"])))[:count]
        return {
            named[int(index)]: entity_name("nickname", int(nickname))
            for index, nickname in zip(chosen, nicknames, strict=True)
        }

    def _write_passages(self, rng: np.random.Generator) -> None:
        written = [(keyword, subject) for keyword, facts in self.facts.items() for subject in facts]
        written += [("called", subject) for subject in self.aliases]
        for row, index in enumerate(rng.permutation(len(written))):
            keyword, subject = written[int(index)]
            if keyword == "called":
                template, value = ALIAS_PASSAGE, self.aliases[subject]
            else:
                phrasings = RELATIONS[keyword].passages
                template, value = phrasings[int(rng.integers(len(phrasings)))], self.facts[keyword][subject]
            passage_id = f"p{row:07d}"
            self.passage_ids[keyword, subject] = passage_id
            self.corpus.append(Passage(passage_id, f"{subject}\n{template.format(s=subject, v=value)}"))

    def walk(self, subject: str, chain: Sequence[str]) -> list[tuple[str, str, str]]:
        """The facts along a chain from a subject, each as (keyword, subject, value)."""
        steps = []
        for keyword in chain:
            value = self.facts[keyword][subject]
            steps.append((keyword, subject, value))
            subject = value
        return steps

    def golden_answers(self, name: str) -> tuple[str, ...]:
        """The name of an entity, followed by its nickname if it has one."""
        return (name, self.aliases[name]) if name in self.aliases else (name,)

    def draw_questions(self, num_questions: int, subset: str, rng: np.random.Generator) -> Iterator[Question]:
        """Distinct questions in random order, with shares of hops as near to the intended ones as the world allows."""
        hops_wanted = sorted(hops for hops in CHAINS if subset == "all" or (hops == 1) == (subset == "single_hop"))
        total_share = sum(_HOP_SHARES[hops] for hops in hops_wanted)
        exact = {hops: num_questions * _HOP_SHARES[hops] / total_share for hops in hops_wanted}
        counts = {hops: int(number) for hops, number in exact.items()}
        largest_rests = sorted(hops_wanted, key=lambda hops: counts[hops] - exact[hops])
        for hops in largest_rests[: num_questions - sum(counts.values())]:
            counts[hops] += 1
        picked: list[tuple[tuple[str, ...], str]] = []
        for hops in hops_wanted:
            pool = [(chain, name) for chain in CHAINS[hops] for name in self.facts[chain[0]]]
            picked += [pool[int(index)] for index in rng.permutation(len(pool))[: counts[hops]]]
        for index in rng.permutation(len(picked)):
            yield self._ask(*picked[int(index)], rng)

    def _ask(self, chain: tuple[str, ...], subject: str, rng: np.random.Generator) -> Question:
        phrase = subject
        for keyword in chain:
            phrases = RELATIONS[keyword].phrases
            phrase = phrases[int(rng.integers(len(phrases)))].format(s=phrase)
        text = OPENINGS[int(rng.integers(len(OPENINGS)))].format(phrase=phrase)
        steps = self.walk(subject, chain)
        return Question(
            id=f"{'.'.join(chain)}:{subject}",
            text=text,
            golden_answers=self.golden_answers(steps[-1][2]),
            metadata={
                "dataset": "single_hop" if len(chain) == 1 else "multi_hop",
                "hops": len(chain),
                "chain": chain,
                "subject": subject,
                "supporting": tuple(self.passage_ids[keyword, entity] for keyword, entity, _ in steps),
            },
        )


def make_world(config: TinyConfig) -> World:
    """The world behind a configuration; the settings of the questions do not change its facts."""
    return World(config.num_passages, _generator(config, "facts"))


@DATASETS.register("tiny", TinyConfig)
def tiny(config: TinyConfig) -> QuestionSet:
    """Questions about a world, and its passages as the corpus."""
    world = make_world(config)
    questions = list(world.draw_questions(config.num_questions, config.subset, _generator(config, config.subset)))
    return QuestionSet("tiny", questions, world.corpus)


def _generator(config: TinyConfig, purpose: str) -> np.random.Generator:
    key = (config.seed, zlib.crc32(config.split.encode()), zlib.crc32(purpose.encode()))
    return np.random.default_rng(np.random.SeedSequence(key))
