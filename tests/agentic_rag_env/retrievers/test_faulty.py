"""Faults come where and as often as they should, end only their own episodes, and a run counts and survives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.retrievers.faulty import FaultyConfig, FaultyRetriever
from agentic_rag_env.types import Passage
from agentic_rag_env.vector import AgenticRAGVectorEnv, info_at

MANY = [f"query {number}" for number in range(4000)]


class Always:
    """Finds one passage for every query."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        self.asked.append(list(queries))
        return [[Passage("1", query, 1.0)] for query in queries]

    def stats(self) -> dict[str, int]:
        return {"asked": sum(map(len, self.asked))}


def faulty(**settings: Any) -> FaultyRetriever:
    return FaultyRetriever(FaultyConfig(Always(), **{"delay_s": 0.0, **settings}))


def kinds(retriever: FaultyRetriever, queries: list[str]) -> list[str]:
    found = retriever.search(queries, 3)
    return [type(result).__name__ if isinstance(result, RetrieverError) else f"{len(result)} found" for result in found]


@pytest.mark.parametrize(
    ("kind", "outcome"), [("error", "RetrieverError"), ("timeout", "RetrieverError"), ("empty", "0 found")]
)
def test_the_share_of_faults_is_as_set(kind: str, outcome: str) -> None:
    outcomes = kinds(faulty(**{f"{kind}_fraction": 0.2}), MANY)
    # Four standard deviations of 4000 draws: 4 sqrt(4000 * 0.2 * 0.8) = 101.
    assert abs(outcomes.count(outcome) - 800) <= 101
    assert outcomes.count("1 found") == 4000 - outcomes.count(outcome)


def test_faults_exclude_each_other() -> None:
    retriever = faulty(error_fraction=0.3, timeout_fraction=0.2, empty_fraction=0.4, slow_fraction=0.1)
    found = retriever.search(MANY, 3)
    failed = [str(result) for result in found if isinstance(result, RetrieverError)]
    shares = [
        sum("failed" in message for message in failed),
        sum("timed out" in message for message in failed),
        sum(result == [] for result in found),
        sum(not isinstance(result, RetrieverError) and len(result) == 1 for result in found),
    ]
    assert np.allclose(np.array(shares) / 4000, [0.3, 0.2, 0.4, 0.1], atol=0.03)


def test_no_faults_by_default_and_all_if_asked_for() -> None:
    assert set(kinds(faulty(), MANY)) == {"1 found"}
    assert set(kinds(faulty(error_fraction=1.0), MANY)) == {"RetrieverError"}


def test_seed_and_query_decide_however_they_come() -> None:
    settings = {"error_fraction": 0.3, "empty_fraction": 0.3}
    together = kinds(faulty(seed=1, **settings), MANY[:50])
    assert [kinds(faulty(seed=1, **settings), [query])[0] for query in MANY[:50]] == together
    assert kinds(faulty(seed=1, **settings), MANY[:50][::-1]) == together[::-1]
    assert kinds(faulty(seed=2, **settings), MANY[:50]) != together


def test_faulty_queries_are_not_searched_and_the_others_go_together() -> None:
    inner = Always()
    retriever = FaultyRetriever(FaultyConfig(inner, error_fraction=0.5))
    outcomes = kinds(retriever, MANY[:20])
    passed_on = [query for query, outcome in zip(MANY, outcomes, strict=False) if outcome == "1 found"]
    assert inner.asked == [passed_on]
    assert 0 < len(passed_on) < 20
    assert retriever.stats() == {"asked": len(passed_on)}


def test_delays_pass_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("agentic_rag_env.retrievers.faulty.time.sleep", pauses.append)
    assert set(kinds(faulty(slow_fraction=1.0, delay_s=2.0), MANY)) == {"1 found"}
    assert set(kinds(faulty(timeout_fraction=1.0, delay_s=3.0), MANY)) == {"RetrieverError"}
    faulty(error_fraction=1.0, delay_s=4.0).search(MANY, 3)
    assert pauses == [2.0, 3.0]


def test_messages_name_the_query() -> None:
    (error,) = faulty(error_fraction=1.0).search(["who?"], 3)
    assert str(error) == "injected fault: the search for 'who?' failed."
    (error,) = faulty(timeout_fraction=1.0, delay_s=0.01).search(["who?"], 3)
    assert str(error) == "injected fault: the search for 'who?' timed out after 0.01 s."


def test_hostile_queries() -> None:
    assert len(faulty(error_fraction=0.5).search(["\ud800", "", "\x00"], 3)) == 3
    assert faulty().search([], 3) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"error_fraction": -0.1}, r"error_fraction must be in \[0, 1\], got -0.1"),
        ({"slow_fraction": 1.1}, "slow_fraction"),
        ({"error_fraction": 0.6, "empty_fraction": 0.5}, "the sum of the fractions must be at most 1, got 1.1"),
        ({"delay_s": -1}, "delay_s"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        faulty(**settings)


def test_a_cache_behind_and_before(world: QuestionSet) -> None:
    spec = {"name": "faulty", "error_fraction": 0.5, "retriever": {"name": "cached", "retriever": "bm25"}}
    behind = RETRIEVERS.build(spec, corpus=world.corpus)
    before = RETRIEVERS.build({"name": "cached", "retriever": {**spec, "retriever": "bm25"}}, corpus=world.corpus)
    for retriever in (behind, before):
        first, second = (kinds(retriever, MANY[:20]) for _ in range(2))
        assert first == second
        assert 0 < first.count("RetrieverError") < 20
    num_right = first.count("0 found")
    assert behind.stats() == {"cache_hits": num_right, "cache_misses": num_right}
    assert before.stats() == {"cache_hits": num_right, "cache_misses": 40 - num_right}
    assert (
        before.fingerprint
        != RETRIEVERS.build(
            {"name": "cached", "retriever": {**spec, "retriever": "bm25", "seed": 1}}, corpus=world.corpus
        ).fingerprint
    )


# --- in the environment ----------------------------------------------------------------------------------------------


def outcome(info: Any) -> tuple[Any, ...]:
    return info["error"], info["passages"], info["num_searches"]


def test_a_failed_query_ends_its_own_episode_alone(world: QuestionSet) -> None:
    spec = {"name": "faulty", "error_fraction": 0.5}
    envs = AgenticRAGVectorEnv(16, dataset=world, retriever=spec, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    queries = [f"Seine {number}" for number in range(16)]
    _, rewards, terminations, truncations, infos = envs.step([f"<search> {query} </search>" for query in queries])
    plain = BM25Retriever(BM25Config(), world.corpus).search(queries, 3)
    assert 0 < truncations.sum() < 16
    assert not rewards.any()
    assert not terminations.any()
    for row, query in enumerate(queries):
        env = AgenticRAGEnv(world, spec)
        env.reset(seed=row)
        _, _, _, truncated, info = env.step(f"<search> {query} </search>")
        assert truncated == truncations[row]
        assert outcome(info) == outcome(info_at(infos, row))
        if truncated:
            assert info["error"] == f"injected fault: the search for {query!r} failed."
        else:
            assert list(info["passages"]) == plain[row]


def test_the_others_go_on(world: QuestionSet) -> None:
    spec = {"name": "faulty", "error_fraction": 0.5}
    envs = AgenticRAGVectorEnv(16, dataset=world, retriever=spec, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    _, _, _, truncations, _ = envs.step([f"<search> Seine {number} </search>" for number in range(16)])
    actions = [None if ended else "<answer> Paris </answer>" for ended in truncations]
    _, _, terminations, _, _ = envs.step(actions)
    assert np.array_equal(terminations, ~truncations)
