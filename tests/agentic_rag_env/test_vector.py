from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agentic_rag_env import (
    AgenticRAGEnv,
    AgenticRAGVectorEnv,
    ConfigurationError,
    QuestionSet,
    ResetNeededError,
    info_at,
)
from agentic_rag_env.errors import AgenticRAGError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.rewards import Outcome
from agentic_rag_env.types import Passage

N = 5
SEARCH = "<search> Seine </search>"
ANSWER = "<answer> Paris </answer>"
JUNK = "hm"


class Recording:
    """Passes on to another retriever and remembers the calls; fails on the query "fail"."""

    def __init__(self, inner: Retriever) -> None:
        self.inner = inner
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.calls.append(list(queries))
        if "fail" in queries:
            raise RetrieverError("down")
        return self.inner.search(queries, top_k)


@pytest.fixture
def recording(world: QuestionSet) -> Recording:
    return Recording(RETRIEVERS.build("bm25", corpus=world.corpus))


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit, types and dtypes included."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        assert_same(tuple(ours.tolist()), tuple(theirs.tolist()))
    else:
        assert ours == theirs


# --- equal to N single environments --------------------------------------------------------------------------------


@pytest.mark.parametrize("final_turn", ["none", "no_search", "forced"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_equal_to_single_environments_bit_for_bit(world: QuestionSet, mode: AutoresetMode, final_turn: str) -> None:
    settings = {"dataset": world, "max_turns": 2, "final_turn": final_turn, "render_mode": "ansi", "reward": "f1"}
    ours = AgenticRAGVectorEnv(N, autoreset_mode=mode, **settings)
    theirs = SyncVectorEnv([lambda: AgenticRAGEnv(**settings)] * N, autoreset_mode=mode)
    assert_same(ours.reset(seed=7), theirs.reset(seed=7))
    rng = np.random.default_rng(0)
    texts = [SEARCH, ANSWER, JUNK, "<answer> Gustave </answer>", "<search> tower Paris </search>", " x </answer>", ""]
    ended = 0
    for _ in range(60):
        actions = tuple(rng.choice(texts, size=N).tolist())
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
        assert_same(ours.render(), theirs.render())
        done = result[2] | result[3]
        ended += done.sum()
        if mode is AutoresetMode.DISABLED and done.any():
            assert_same(
                ours.reset(options={"reset_mask": done.copy()}), theirs.reset(options={"reset_mask": done.copy()})
            )
    assert ended > 50
    assert ours.np_random_seed == theirs.np_random_seed == tuple(range(7, 7 + N))
    assert [rng.bit_generator.state for rng in ours.np_random] == [rng.bit_generator.state for rng in theirs.np_random]


@pytest.mark.parametrize("seed", [3, [5, None, 1, 1, 0], None])
def test_seeds_as_gymnasium_gives_them(world: QuestionSet, seed: Any) -> None:
    ours = AgenticRAGVectorEnv(N, dataset=world)
    theirs = SyncVectorEnv([lambda: AgenticRAGEnv(world)] * N)
    for envs in (ours, theirs):
        envs.reset(seed=0)
    assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))
    assert_same(ours.reset(), theirs.reset())


def test_seeds_may_be_an_array(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(3, dataset=world)
    assert envs.reset(seed=np.array([5, 1, 1]))[0] == envs.reset(seed=[5, 1, 1])[0]
    assert envs.np_random_seed == (5, 1, 1)
    assert envs.reset(seed=np.int64(5))[0] == envs.reset(seed=5)[0]
    assert envs.np_random_seed == (5, 6, 7)


def test_spaces_and_metadata(world: QuestionSet) -> None:
    ours = AgenticRAGVectorEnv(N, dataset=world)
    theirs = SyncVectorEnv([lambda: AgenticRAGEnv(world)] * N)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    assert ours.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observations, _ = ours.reset(seed=0)
    assert observations in ours.observation_space
    assert ours.action_space.sample() in ours.action_space
    assert ours.dataset is world


# --- one search per step -------------------------------------------------------------------------------------------


def test_one_search_per_step_in_the_order_of_the_rows(world: QuestionSet, recording: Recording) -> None:
    envs = AgenticRAGVectorEnv(N, dataset=world, retriever=recording, top_k=1)
    envs.reset(seed=0)
    envs.step(("<search> Seine </search>", JUNK, "<search> Berlin </search>", ANSWER, "<search> Seine </search>"))
    assert recording.calls == [["Seine", "Berlin", "Seine"]]
    envs.step((JUNK, JUNK, ANSWER, SEARCH, JUNK))  # row 3 begins anew, its search is ignored
    assert recording.calls == [["Seine", "Berlin", "Seine"]]
    envs.step((JUNK, JUNK, JUNK, SEARCH, JUNK))
    assert recording.calls == [["Seine", "Berlin", "Seine"], ["Seine"]]


def test_a_failed_search_ends_the_episodes_that_took_part(world: QuestionSet, recording: Recording) -> None:
    envs = AgenticRAGVectorEnv(N, dataset=world, retriever=recording, autoreset_mode="Disabled")
    envs.reset(seed=0)
    observations, rewards, terminations, truncations, infos = envs.step(
        (SEARCH, JUNK, "<search> fail </search>", ANSWER, None)
    )
    assert truncations.tolist() == [True, False, True, False, False]
    assert terminations.tolist() == [False, False, False, True, False]
    assert rewards.tolist()[:3] == [0.0, 0.0, 0.0]
    assert infos["error"].tolist() == ["down", None, "down", None, None]
    assert infos["num_searches"].tolist() == [0, 0, 0, 0, 0]
    assert (observations[0], observations[2]) == ("", "")


def test_any_other_failure_is_raised_with_the_questions(world: QuestionSet) -> None:
    class Broken:
        def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
            raise ZeroDivisionError

    envs = AgenticRAGVectorEnv(3, dataset=world, retriever=Broken())
    envs.reset(options={"question_index": np.array([0, 1, 2])})
    with pytest.raises(ZeroDivisionError) as caught:
        envs.step((SEARCH, JUNK, "<search> x </search>"))
    assert caught.value.__notes__ == ["While searching for question 'capital', 'tower': ['Seine', 'x']"]


# --- rows on their own ---------------------------------------------------------------------------------------------


def test_disabled_mode_leaves_rows_alone(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(3, dataset=world, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(options={"question_index": np.array([0, 1, 2])})
    observations, rewards, terminations, _, infos = envs.step((ANSWER, None, JUNK))
    assert (observations[0], observations[1]) == ("", "")
    assert rewards.tolist() == [1.0, 0.0, 0.0]
    assert terminations.tolist() == [True, False, False]
    assert infos["_turn"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="Row 1 has no info"):
        info_at(infos, 1)

    with pytest.raises(ResetNeededError, match="Row 0 has no running episode"):
        envs.step((ANSWER, JUNK, JUNK))
    # Nothing has moved: row 1 is still in its first turn, row 2 in its second.
    _, _, _, _, infos = envs.step((None, JUNK, SEARCH))
    assert infos["turn"].tolist() == [0, 1, 2]

    mask = np.array([True, False, False])
    options = {"reset_mask": mask, "question_index": np.array([3, 99, -9])}  # rows outside the mask don't matter
    observations, infos = envs.reset(options=options)
    assert options.keys() == {"reset_mask", "question_index"}  # the caller's mapping stays whole
    assert observations[0] == "Who sang Let It Be?\n"
    assert observations[2].startswith("\n\n<information>")
    assert infos["_question_id"].tolist() == [True, False, False]
    _, rewards, terminations, _, infos = envs.step(("<answer>Beatles</answer>", None, None))
    assert (rewards[0], terminations[0], infos["turn"][0]) == (1.0, True, 1)

    observations, rewards, terminations, truncations, infos = envs.step((None, None, None))
    assert observations == ("", "", "")
    assert not rewards.any() and not terminations.any() and not truncations.any()  # noqa: PT018
    assert infos == {}


def test_an_episode_that_is_cut_off_earns_what_no_answer_earns(world: QuestionSet) -> None:
    outcomes = []

    def reward(outcome: Outcome) -> float:
        outcomes.append(outcome)
        return 0.25

    envs = AgenticRAGVectorEnv(2, dataset=world, autoreset_mode=AutoresetMode.DISABLED, reward=reward)
    prompts, _ = envs.reset(options={"question_index": np.array([0, 1])})
    with pytest.raises(ResetNeededError, match="between two turns"):
        envs.cut_off(0)
    (hint, _), *_ = envs.step((JUNK, None))
    infos = envs.step((SEARCH, SEARCH))[4]
    cut = envs.cut_off(0)
    assert cut[:4] == ("", 0.25, False, True)
    assert cut.info == info_at(infos, 0) | {"ending": "out_of_tokens"}
    assert infos["ending"].tolist() == [None, None]
    (outcome,) = outcomes
    assert (outcome.question.id, outcome.answer, outcome.prompt) == (world[0].id, None, prompts[0])
    assert outcome.turns == ((JUNK, hint), (SEARCH, ""))  # what was found last is read by nobody
    for again in (lambda: envs.cut_off(0), lambda: envs.step((ANSWER, None))):
        with pytest.raises(ResetNeededError):
            again()
    _, rewards, *_ = envs.step((None, ANSWER))
    assert rewards.tolist() == [0.0, 0.25]
    with pytest.raises(ConfigurationError, match="cut_off needs autoreset_mode DISABLED"):
        AgenticRAGVectorEnv(1, dataset=world).cut_off(0)


def test_question_index_and_draws_mix(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(4, dataset=world)
    drawn = envs.reset(seed=11)[1]["question_id"].tolist()
    _, infos = envs.reset(seed=11, options={"question_index": np.array([-1, 2, -1, 0])})
    assert infos["question_id"].tolist() == [drawn[0], "tower", drawn[2], "capital"]
    _, infos = envs.reset(options={"question_index": 1})
    assert infos["question_id"].tolist() == ["river"] * 4


def test_next_step_ignores_the_action_of_a_finished_row(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(2, dataset=world)
    envs.reset(seed=0)
    envs.step((ANSWER, JUNK))
    observations, rewards, terminations, _, infos = envs.step((None, JUNK))
    assert observations[0] in {f"{question.text.rstrip('?')}?\n" for question in world}
    assert (rewards[0], terminations[0], infos["turn"].tolist()) == (0.0, False, [0, 2])


def test_info_at_is_the_info_of_the_single_environment(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(3, dataset=world, autoreset_mode=AutoresetMode.SAME_STEP)
    single = AgenticRAGEnv(world)
    _, infos = envs.reset(options={"question_index": 0})
    _, info = single.reset(options={"question_index": 0})
    assert [info_at(infos, row) for row in range(3)] == [info] * 3
    infos = envs.step((SEARCH, JUNK, ANSWER))[4]
    assert_same(info_at(infos, 0), single.step(SEARCH)[4])
    assert info_at(infos, 2)["turn"] == 0  # already the next episode
    single.reset(options={"question_index": 0})
    assert_same(info_at(infos["final_info"], 2), single.step(ANSWER)[4])
    assert infos["final_obs"].tolist() == [None, None, ""]
    with pytest.raises(ValueError, match="Row 0 has no info"):
        info_at(infos["final_info"], 0)


def test_results_are_not_overwritten_by_the_next_step(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(2, dataset=world)
    envs.reset(options={"question_index": 0})
    _, rewards, terminations, _, infos = envs.step((ANSWER, JUNK))
    envs.step((JUNK, JUNK))
    assert rewards.tolist() == [1.0, 0.0]
    assert terminations.tolist() == [True, False]
    assert infos["turn"].tolist() == [1, 1]


# --- Gymnasium's make_vec, and mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, "SameStep", "NextStep", "Disabled"])
def test_make_vec_uses_the_batched_environment(world: QuestionSet, mode: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gymnasium.make_vec("AgenticRAG-v0", num_envs=3, dataset=world, autoreset_mode=mode, max_turns=1)
        assert type(envs.unwrapped) is AgenticRAGVectorEnv
        assert envs.metadata["autoreset_mode"] is AutoresetMode(mode)
        envs.reset(seed=0)
        assert envs.step((JUNK,) * 3)[3].tolist() == [False] * 3
        assert envs.step((JUNK,) * 3)[3].tolist() == [True] * 3
        assert envs.spec is not None
        assert envs.spec.id == "AgenticRAG-v0"
        envs.close()
        envs.close()


def test_in_processes_of_their_own_rows_are_the_same(world: QuestionSet) -> None:
    """Without shared memory, for which a text would need a longest length."""
    settings: dict[str, Any] = {"num_envs": 2, "dataset": world, "max_turns": 1}
    apart = gymnasium.make_vec(
        "AgenticRAG-v0", vectorization_mode="async", vector_kwargs={"shared_memory": False}, **settings
    )
    together = gymnasium.make_vec("AgenticRAG-v0", **settings)
    try:
        assert apart.reset(seed=3)[0] == together.reset(seed=3)[0]
        for actions in ((SEARCH, JUNK), (ANSWER, JUNK)):
            ours, theirs = apart.step(actions), together.step(actions)
            assert ours[0] == theirs[0]
            for one, other in zip(ours[1:4], theirs[1:4], strict=True):
                assert one.tolist() == other.tolist()
    finally:
        apart.close()


def test_make_vec_with_gymnasiums_own_loop_gives_the_same(world: QuestionSet) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gymnasium.make_vec("AgenticRAG-v0", num_envs=2, dataset=world)
        theirs = gymnasium.make_vec("AgenticRAG-v0", num_envs=2, vectorization_mode="sync", dataset=world)
        assert_same(ours.reset(seed=0), theirs.reset(seed=0))
        assert_same(ours.step((SEARCH, ANSWER)), theirs.step((SEARCH, ANSWER)))


def test_default_arguments() -> None:
    envs = gymnasium.make_vec("AgenticRAG-v0", num_envs=64)
    observations, _ = envs.reset(seed=0)
    assert len(observations) == 64
    observations = envs.step([f"<search> {prompt} </search>" for prompt in observations])[0]
    assert all(text.startswith("\n\n<information>Doc 1(Title: ") for text in observations)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"autoreset_mode": "NextStpe"}, "Disabled, got 'NextStpe'. Did you mean 'NextStep'?"),
        ({"render_mode": "human"}, "must be one of ansi, or None, got 'human'"),
        ({"retriever": "bm52"}, "Did you mean 'bm25'?"),
    ],
)
def test_settings_that_cannot_work_are_refused(world: QuestionSet, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AgenticRAGError) as caught:
        AgenticRAGVectorEnv(**({"num_envs": 2, "dataset": world} | settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"seed": [1, 2]}, "seed needs one value per row, 3, got 2"),
        ({"seed": np.array([1, 2])}, "seed needs one value per row, 3, got 2"),
        ({"seed": np.array(1.5)}, "seed must be an integer, 3 of them or None, got array(1.5)"),
        ({"seed": [0, 1.0, 2]}, "seed of row 1 must be an integer of at least 0, or None, got 1.0"),
        ({"seed": "123"}, "seed must be an integer, 3 of them or None, got '123'"),
        ({"seed": -1}, "seed must be an integer of at least 0, or None, got -1"),
        ({"seed": [0, 0, -1]}, "seed of row 2 must be an integer of at least 0, or None, got -1"),
        ({"seed": 1.5}, "seed must be an integer, 3 of them or None, got 1.5"),
        ({"options": 3}, "options of reset must be a mapping"),
        ({"options": {"question_index": "1"}}, "an int or 3 of them, got '1'"),
        ({"options": {"question_index": [1.0, 0, 0]}}, "an int or 3 of them"),
        ({"options": {"question_index": [0, [1, 2], 0]}}, "an int or 3 of them, got [0, [1, 2], 0]"),
        ({"options": {"question_index": [0, None, 0]}}, "an int or 3 of them"),
        ({"options": {"question_index": True}}, "an int or 3 of them"),
        ({"options": {"reset_mask": [[True], True]}}, "array of 3 bools with at least one True, got [[True], True]"),
        ({"options": {"reset_mark": 1}}, "Did you mean 'reset_mask'?"),
        ({"options": {"reset_mask": np.ones(2, dtype=bool)}}, "array of 3 bools with at least one True"),
        ({"options": {"reset_mask": np.ones(3)}}, "array of 3 bools"),
        ({"options": {"reset_mask": np.zeros(3, dtype=bool)}}, "at least one True"),
        ({"options": {"question_index": [0, 1]}}, "an int or 3 of them"),
        ({"options": {"question_index": 0.5}}, "an int or 3 of them"),
        ({"options": {"question_index": [0, 4, 0]}}, "must be in [0, 4) for dataset 'small', or -1 to draw one, got 4"),
        ({"options": {"question_index": [0, -2, 0]}}, "got -2"),
    ],
)
def test_reset_arguments_that_do_not_fit(world: QuestionSet, reset: dict[str, Any], message: str) -> None:
    envs = AgenticRAGVectorEnv(3, dataset=world)
    with pytest.raises(ConfigurationError) as caught:
        envs.reset(**reset)
    assert message in str(caught.value)


def test_step_arguments_that_do_not_fit(world: QuestionSet) -> None:
    envs = AgenticRAGVectorEnv(3, dataset=world)
    with pytest.raises(ResetNeededError, match="Row 0 has no running episode"):
        envs.step((JUNK,) * 3)
    envs.reset()
    with pytest.raises(ConfigurationError, match="one text per row, 3"):
        envs.step((JUNK,) * 2)
    with pytest.raises(ConfigurationError, match="one text per row, 3"):
        envs.step("abc")
    with pytest.raises(ConfigurationError, match="row 1 is None, which only autoreset_mode DISABLED allows"):
        envs.step((JUNK, None, JUNK))
    with pytest.raises(TypeError, match="row 2 must be a text, got int: 7"):
        envs.step((JUNK, JUNK, 7))  # type: ignore[arg-type]
    assert envs.step((JUNK,) * 3)[4]["turn"].tolist() == [1, 1, 1]
