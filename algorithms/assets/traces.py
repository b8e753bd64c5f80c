"""Makes the training text of the bundled models: scripted search traces, and reading exercises without any search.

A document is a list of (text, weight) segments. The weight applies to the segment's tokens in the language-model loss.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from agentic_rag_env.datasets.tiny import RELATIONS, TinyConfig, World
from agentic_rag_env.prompts import format_passages, information_block, render_prompt
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.types import Passage, Question
from algorithms.assets.tokenizer import EOS

Document = list[tuple[str, float]]

#: Weight of text that the model reads; text that it learns to write has weight 1.
CONTEXT_WEIGHT = 0.05
TOP_K = 3
MAX_SEARCHES = 4


@dataclass
class _Trace:
    """A scripted expert at work on one question."""

    question: Question
    steps: list[tuple[str, str, str]]
    document: Document
    position: int = 0
    num_searches: int = 0
    query: str = ""
    gold: str = ""
    done: bool = False


def search_traces(
    world: World, num_questions: int, rng: np.random.Generator, draw: random.Random
) -> Iterator[Document]:
    """Write whole episodes of an expert who looks up one relation after the other and then answers.

    One query in ten names the entity alone. If that misses the fact, the expert says so and searches again.
    """
    retriever = BM25Retriever(BM25Config(), world.corpus)
    traces = []
    for question in world.draw_questions(num_questions, "all", rng):
        steps = world.walk(question.metadata["subject"], question.metadata["chain"])
        trace = _Trace(question, steps, [(render_prompt("bare", question.text), 0.0)])
        _search(trace, "<think>", draw, world)
        traces.append(trace)
    while active := [trace for trace in traces if not trace.done]:
        results = retriever.search([trace.query for trace in active], TOP_K)
        for trace, passages in zip(active, results, strict=True):
            _read(trace, passages, draw, world)
    for trace in traces:
        if trace.num_searches <= MAX_SEARCHES:
            yield trace.document


def _search(trace: _Trace, thought: str, draw: random.Random, world: World) -> None:
    keyword, entity, _ = trace.steps[trace.position]
    careless = draw.random() < 0.1 and "missing" not in thought
    trace.query = entity if careless else draw.choices((f"{entity} {keyword}", f"{keyword} {entity}"), (5, 1))[0]
    trace.gold = world.passage_ids[keyword, entity]
    trace.num_searches += 1
    trace.document.append((f"{thought} next {keyword} of {entity}</think><search> {trace.query}</search>", 1.0))


def _read(trace: _Trace, passages: list[Passage], draw: random.Random, world: World) -> None:
    trace.document.append((information_block(format_passages(passages)), 0.0))
    keyword, entity, value = trace.steps[trace.position]
    if trace.gold not in {passage.id for passage in passages}:
        _search(trace, f"<think> {keyword} of {entity} missing.", draw, world)
        return
    thought = f"<think> {keyword} of {entity} is {value}."
    trace.position += 1
    if trace.position < len(trace.steps):
        _search(trace, thought, draw, world)
    else:
        trace.document.append((f"{thought} done</think><answer> {value}</answer>{EOS}", 1.0))
        trace.done = True


def reading_exercises(world: World, count: int, draw: random.Random) -> Iterator[Document]:
    """Write passages, then statements and direct questions about the facts in them."""
    facts = _Facts(world)
    for _ in range(count):
        chosen = facts.confusable(draw.randint(2, 5), draw)
        document: Document = [(facts.block(chosen), CONTEXT_WEIGHT)]
        for keyword, entity in draw.choices(chosen, k=draw.randint(2, 6)):
            phrase = draw.choice(RELATIONS[keyword].phrases).format(s=entity)
            statement = draw.choice((f" {keyword} of {entity} is", f" {phrase} is", f"What is {phrase}?"))
            document += [
                (statement, CONTEXT_WEIGHT),
                (f" {world.facts[keyword][entity]}", 1.0),
                (".\n", CONTEXT_WEIGHT),
            ]
        yield document


def copying_exercises(world: World, count: int, draw: random.Random) -> Iterator[Document]:
    """Write a short random list of names and words again and again."""
    words = [*RELATIONS, *(name for names in world.entities.values() for name in names)]
    for _ in range(count):
        text = "".join(f" {word}" for word in draw.sample(words, draw.randint(2, 8))) + "\n"
        yield [(text, 0.0), (text * draw.randint(1, 3), 1.0)]


def fragments(world: World, count: int, draw: random.Random) -> Iterator[Document]:
    """Write tags of the protocol and the text between them, never after a question."""
    facts = _Facts(world)
    for _ in range(count):
        chosen = facts.confusable(TOP_K, draw)
        keyword, entity = draw.choice(chosen)
        value = world.facts[keyword][entity]
        query = f"{entity} {keyword}"
        yield draw.choice(
            (
                [
                    (f"<search> {query}</search>", CONTEXT_WEIGHT),
                    (facts.block(chosen), 0.0),
                    (f"<think> {keyword} of {entity} is {value}.", 1.0),
                ],
                [(f"<think> next {keyword} of {entity}", CONTEXT_WEIGHT), (f"</think><search> {query}</search>", 1.0)],
                [(f"<think> {keyword} of {entity} is {value}. done", CONTEXT_WEIGHT),
                 (f"</think><answer> {value}</answer>{EOS}", 1.0)],
            )
        )  # fmt: skip


def fresh_world(draw: random.Random) -> World:
    """Make a world from a seed outside 0 to 999; those seeds belong to users."""
    config = TinyConfig(num_passages=draw.choice((300, 600, 1000)))
    return World(config.num_passages, np.random.default_rng((1000 + draw.randrange(2**32), 7)))


class _Facts:
    """The facts of a world, for drawing those that are easily confused."""

    def __init__(self, world: World) -> None:
        by_id = {passage.id: passage for passage in world.corpus}
        self.passages = {
            fact: by_id[passage_id] for fact, passage_id in world.passage_ids.items() if fact[0] != "called"
        }
        self.all = list(self.passages)
        self.about: dict[str, list[tuple[str, str]]] = {}
        for keyword, subject in self.all:
            for name in (subject, world.facts[keyword][subject]):
                self.about.setdefault(name, []).append((keyword, subject))

    def confusable(self, count: int, draw: random.Random) -> list[tuple[str, str]]:
        """Draw distinct facts in random order; most of the time some share an entity, as search results do."""
        anchor = draw.choice(self.all)
        related = self.about[anchor[1]]
        chosen = {anchor: None}
        if draw.random() < 0.7:
            chosen |= dict.fromkeys(draw.sample(related, min(len(related), 2)))
        while len(chosen) < count:
            chosen[draw.choice(self.all)] = None
        facts = list(chosen)[:count]
        draw.shuffle(facts)
        return facts

    def block(self, facts: list[tuple[str, str]]) -> str:
        """The facts' passages as a retriever's reply."""
        return information_block(format_passages(self.passages[fact] for fact in facts))
