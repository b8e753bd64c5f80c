"""What the environment itself costs: a step beside the retriever, a row of a vector environment, a cut, a check.

Run with `pytest benchmarks/test_environment.py -s`; the last test prints the table. On a busy machine,
--benchmark-timer=time.process_time measures processor time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import pytest

from agentic_rag_env import AgenticRAGVectorEnv, FreeText
from agentic_rag_env.budget import Budget
from agentic_rag_env.types import Passage, Question

#: Most that a step may cost beside its search, a cut of an observation, and a step of endless text [microseconds].
MOST_STEP_US, MOST_CUT_US, MOST_LONG_STEP_US = 50.0, 5000.0, 50_000.0
ROWS = (64, 1024)
TURNS = {
    "search": "<think> who founded it </think> <search> founder of it </search>",
    "malformed": "I think it was Ann.",
    "answer": "<think> it was Ann </think> <answer> Ann </answer>",
}
PROSE = "The company was founded by Ann in 1960 on the banks of the river, and it sells lamps. "
_MEASURED: dict[str, float] = {}


class Instant:
    """A retriever that costs nothing."""

    passages = tuple(Passage(str(rank), "Company\n" + 3 * PROSE) for rank in range(3))

    def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Passage, ...]]:
        return [self.passages[:top_k] for _ in queries]


def settings() -> dict[str, Any]:
    questions = [Question(str(number), "Who founded it?", ("Ann",)) for number in range(100)]
    return {"dataset": questions, "retriever": Instant(), "max_turns": 10, "max_observation_chars": 2000}


def measured(benchmark: Any, name: str, of: int, function: Callable[[], Any]) -> float:
    """Microseconds of the fastest round, of one of so many things that it does."""
    benchmark.pedantic(function, rounds=30, iterations=max(1, 500 // of), warmup_rounds=2)
    _MEASURED[name] = benchmark.stats.stats.min / of * 1e6
    return _MEASURED[name]


@pytest.mark.parametrize("action", TURNS)
def test_a_step_as_gymnasium_makes_it(benchmark: Any, action: str) -> None:
    """With the reset that follows an answer."""
    env = gymnasium.make("AgenticRAG-v0", **settings())
    env.reset(seed=0)

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(TURNS[action])
        if terminated or truncated:
            env.reset()

    assert measured(benchmark, f"step, {action}", 1, step) <= MOST_STEP_US


@pytest.mark.parametrize("num_envs", ROWS)
@pytest.mark.parametrize("action", TURNS)
def test_a_row_of_a_vector_environment(benchmark: Any, action: str, num_envs: int) -> None:
    envs = AgenticRAGVectorEnv(num_envs, autoreset_mode="SameStep", **settings())
    envs.reset(seed=0)
    actions = [TURNS[action]] * num_envs
    name = f"row of {num_envs}, {action}"
    assert measured(benchmark, name, num_envs, lambda: envs.step(actions)) <= MOST_STEP_US


def test_checking_free_text(benchmark: Any) -> None:
    """However long it is."""
    space, text = FreeText(), PROSE * 10_000
    assert measured(benchmark, "FreeText.contains", 1, lambda: space.contains(text)) <= 1


@pytest.mark.parametrize("end", ["", "</search>"])
def test_a_step_with_a_million_characters(benchmark: Any, end: str) -> None:
    """A model that repeats itself without end, over the bundled world and BM25 as they are by default."""
    env = gymnasium.make("AgenticRAG-v0")

    def step() -> None:
        env.reset(seed=0)
        env.step("<search>" + "q " * 500_000 + end)

    benchmark.pedantic(step, rounds=20, warmup_rounds=1)  # the index is built in the first one
    name = f"reset and step with 1,000,000 characters, {end or 'no end'}"
    _MEASURED[name] = benchmark.stats.stats.min * 1e6
    assert _MEASURED[name] <= MOST_LONG_STEP_US


@pytest.mark.parametrize("unit", ["chars", "tokens"])
def test_cutting_a_passage_of_ten_megabytes(benchmark: Any, unit: str) -> None:
    passages = [Passage(str(rank), "Company\n" + PROSE * (10_000_000 // len(PROSE))) for rank in range(3)]
    budget = Budget(2000, None, None) if unit == "chars" else Budget(None, 500, byte_pairs())
    cut = budget.observation(passages, "")
    assert budget.length(cut) == (2000 if unit == "chars" else 500)
    measured_us = measured(benchmark, f"cut of 10 MB, {unit}", 50, lambda: [budget.observation(passages, "")] * 50)
    assert measured_us * 50 <= MOST_CUT_US
    _MEASURED[f"cut of 10 MB, {unit}"] *= 50


def byte_pairs() -> Any:
    """A tokenizer like those of real models, with some four characters a token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [PROSE], tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n\n| what | microseconds |\n| --- | --- |")
        for name, value in _MEASURED.items():
            print(f"| {name} | {value:.2f} |")
