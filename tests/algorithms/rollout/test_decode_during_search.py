"""Rows that write on while a search is under way: the same tokens, however long the search takes."""

from __future__ import annotations

import json
import shutil
import threading
import traceback

import numpy as np
import pytest
import torch
from naive_engine import NaiveEngine
from small_runs import DGPO, DGPO_STEPS, KD_STEPS, assert_same_training, resume, train
from toy_policy import make_envs, make_player, make_policy, make_tokenizer, make_world

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.errors import RetrieverError
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import Action
from algorithms.rollout.player import Player
from algorithms.rollout.recorded_steps import unrecorded

#: Longest wait for another thread [seconds]; a test that waits so long fails.
PATIENCE = 60
BASE = {"max_new_tokens": 16, "max_tokens": 300}


def make_toy_player(num_rows=5, spelling="whole", envs=(), recorder=None, **config):
    """In float64, so that the groups in which rows are computed decide no token."""
    config = RolloutConfig(**BASE | config)
    settings = {"precision": "float64", "recorder": recorder}
    model = make_policy(spelling, seed=4).double()
    return make_player(model, make_tokenizer(spelling), make_envs(num_rows, **dict(envs)), config, **settings)


def play(player, num_episodes=17):
    return player.rollout(np.arange(num_episodes) % 8, seed=(1, 2))


def ids_of(trajectories):
    return [[(turn.action_ids.tolist(), turn.observation_ids.tolist()) for turn in one.turns] for one in trajectories]


def logprobs_of(trajectories):
    return np.concatenate([turn.action_logprobs for one in trajectories for turn in one.turns])


# --- the engine ------------------------------------------------------------------------------------------------------


def silent_engine(num_rows, max_tokens, **settings):
    """Its rows end their actions only where there is no more room."""
    model, config = make_policy("whole", eos_bias=-100.0), RolloutConfig(max_new_tokens=30, max_tokens=max_tokens)
    ends = ["</never>"]
    return CachedEngine(model, make_tokenizer("whole"), config, num_rows=num_rows, action_ends=ends, **settings)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_rows_advance_by_so_many_tokens_or_to_the_end_of_their_action(is_recorded):
    settings = {"recorder": lambda: unrecorded} if is_recorded else {}
    engine, draws = silent_engine(5, 30, **settings), np.random.default_rng(0).random((5, 30))
    engine.advance(3)  # nothing is open
    for row, length in enumerate((20, 24, 26, 28)):  # room for 10, 6, 4 and 2 tokens
        engine.open(row, np.arange(length), draws[row])
    assert {action.row: len(action.ids) for action in engine.write()} == {2: 4, 3: 2}
    computed = engine.computed_tokens

    def advanced(max_steps):
        nonlocal computed
        engine.advance(max_steps)
        before, computed = computed, engine.computed_tokens
        return computed - before

    if is_recorded:  # a step was under way when rows 2 and 3 were found to have ended
        assert advanced(1) == 2  # rows 0 and 1 have 6 tokens each, and row 1 ends with it
        assert advanced(3) == 3
        assert advanced(100) == 1  # row 0 ends with its tenth
    else:
        assert advanced(1) == 2  # rows 0 and 1 have 5 tokens each
        assert advanced(3) == 3 + 1  # row 1 ends with its sixth
        assert advanced(100) == 2
    engine.close([2, 3])
    engine.open(3, np.arange(27), draws[3])
    engine.open(4, np.arange(27), draws[4])
    # Two of the four open rows have ended before the new ones, with room for 3 tokens each, have more than their first.
    assert {action.row: len(action.ids) for action in engine.write()} == {1: 6, 0: 10}
    engine.close([0, 1])
    computed = engine.computed_tokens
    assert advanced(100) == 2 + 2
    assert advanced(100) == 0
    assert {action.row: len(action.ids) for action in engine.write()} == {3: 3, 4: 3}
    engine.close([3, 4])
    assert engine.write() == []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("engine", [CachedEngine, NaiveEngine])
def test_an_action_depends_on_its_row_alone_whenever_rows_advance(engine, seed):
    chance, tokenizer = np.random.default_rng(seed), make_tokenizer("pieces")
    config, model = RolloutConfig(**BASE), make_policy("pieces", seed=4)
    draws = chance.random((6, 3, 16))
    prompts = [np.array(tokenizer.encode("who ada lives in oslo?" * count)) for count in range(1, 7)]

    def make(num_rows):
        return engine(model, tokenizer, config, num_rows=num_rows, action_ends=CLOSING_TAGS)

    def go_on(rows, action, number):
        """Continue a row, or close it after three actions."""
        found[number].append(action.ids.tolist())
        if len(found[number]) == 3:
            rows.close([action.row])
        else:
            rows.append(action.row, prompts[number][:5], draws[number][len(found[number])])

    found: dict[int, list] = {number: [] for number in range(6)}
    for number in range(6):
        alone = make(1)
        alone.open(0, prompts[number], draws[number][0])
        while actions := alone.write():
            go_on(alone, actions[0], number)
    expected, found = found, {number: [] for number in range(6)}
    together, late = make(6), [4, 5]
    for number in range(4):
        together.open(number, prompts[number], draws[number][0])
    while actions := together.write():
        together.advance(int(chance.integers(0, 8)))
        for action in actions:
            go_on(together, action, action.row)
        if late and chance.random() < 0.7:
            number = late.pop()
            together.open(number, prompts[number], draws[number][0])
    assert {number: ids for number, ids in found.items() if ids} == {
        number: ids for number, ids in expected.items() if found[number]
    }
    assert all(len(found[number]) == 3 for number in range(4))


def test_rows_that_are_given_up_before_they_were_read_leave_nothing_behind():
    """As when an error ends a rollout between opening rows and writing."""
    engine, draws = silent_engine(3, 30), np.random.default_rng(0).random((3, 30))
    for row in range(3):
        engine.open(row, np.arange(20), draws[row])
    engine.close(range(3))
    engine.open(1, np.arange(25), draws[1])
    assert [(action.row, len(action.ids)) for action in engine.write()] == [(1, 5)]


# --- the player ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("spelling", ["whole", "bytes"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_episodes_are_the_same_however_far_rows_write_during_a_search(spelling, temperature, num_rows):
    settings = {"spelling": spelling, "temperature": temperature, "num_rows": num_rows}
    expected, costs = play(make_toy_player(**settings))
    for max_steps, recorder in ((1, None), (3, lambda: unrecorded), (100, None)):
        player = make_toy_player(**settings, recorder=recorder, decode_during_search=max_steps)
        found, stats = play(player)
        assert ids_of(found) == ids_of(expected)
        assert [one.turns[-1].info for one in found] == [one.turns[-1].info for one in expected]
        np.testing.assert_allclose(logprobs_of(found), logprobs_of(expected), rtol=0, atol=1e-10)
        assert stats.sampled_tokens == costs.sampled_tokens
    assert temperature == 0 or max(len(one.turns) for one in expected) > 1


def test_in_float32_only_the_last_digits_differ():
    players = [make_player(make_policy("bytes", seed=4), make_tokenizer("bytes"), make_envs(5),
                           RolloutConfig(**BASE, decode_during_search=steps)) for steps in (0, 4)]  # fmt: skip
    expected, found = (play(player)[0] for player in players)
    assert ids_of(found) == ids_of(expected)
    np.testing.assert_allclose(logprobs_of(found), logprobs_of(expected), rtol=0, atol=1e-4)


class Searches:
    """A retriever that calls a function before each search."""

    def __init__(self, before):
        self.inner, self.before = BM25Retriever(BM25Config(), make_world().corpus), before

    def search(self, queries, top_k):
        self.before()
        return self.inner.search(queries, top_k)


@pytest.mark.parametrize("first", ["search", "decode"])
def test_a_search_and_decoding_go_on_at_once_and_neither_depends_on_time(first):
    """Rows wait until a step that has begun is over; or a search that has begun waits until they have written."""
    begun, stepped, advanced, during_search = threading.Event(), threading.Event(), threading.Event(), []

    def searching():
        if first == "decode":
            before = computed[0]
            assert advanced.wait(PATIENCE)
            during_search.append(player.engine.computed_tokens - before)

    player = make_toy_player(envs={"retriever": Searches(searching)}, decode_during_search=5)
    advance, step = player.engine.advance, player.envs.step
    computed = [0]

    def stepping(actions):
        computed[0] = player.engine.computed_tokens
        begun.set()
        answer = step(actions)
        stepped.set()
        return answer

    def advancing(max_steps):
        awaited = stepped if first == "search" else begun
        assert awaited.wait(PATIENCE)
        awaited.clear()
        advance(max_steps)
        advanced.set()

    def writing():
        advanced.clear()
        return write()

    write = player.engine.write
    player.engine.advance, player.engine.write, player.envs.step = advancing, writing, stepping
    found, stats = play(player)
    assert first == "search" or max(during_search) >= 2
    expected, costs = play(make_toy_player(decode_during_search=5))
    assert ids_of(found) == ids_of(expected)
    assert logprobs_of(found).tolist() == logprobs_of(expected).tolist(), "bit for bit"
    assert stats.computed_tokens == costs.computed_tokens


def action(row, text):
    ids = np.array(make_tokenizer("whole").encode(text))
    return Action(row, ids, np.zeros(len(ids), dtype=np.float32), text, ends_text=False)


class Scripted:
    """An engine that returns given actions, and notes in which order it is called."""

    def __init__(self, calls, written, **config):
        self.calls, self.written = calls, iter(written)
        self.tokenizer, self.config = make_tokenizer("whole"), RolloutConfig(**BASE | config)
        self.num_rows, self.computed_tokens = 2, 0

    def open(self, row, ids, uniforms):
        self.calls.append(("open", row))

    def append(self, row, ids, uniforms):
        self.calls.append(("append", row))

    def close(self, rows):
        self.calls.extend(("close", row) for row in rows)

    def write(self):
        self.calls.append("write")
        return next(self.written)

    def advance(self, max_steps):
        self.calls.append(("advance", max_steps))


@pytest.mark.parametrize("max_steps", [0, 7])
def test_the_order_of_calls(max_steps):
    """Row 1 ends its action during the search of row 0, and takes the next step together with it."""
    calls: list = []
    searching, answers = "<search> ada</search>", [action(row, "<answer> rome</answer>") for row in range(2)]
    envs, written = make_envs(2), [[action(0, searching)], answers, []]

    def noting(name, call):
        def noted(*args, **kwargs):
            calls.append((name, "here" if threading.current_thread() is threading.main_thread() else "beside"))
            return call(*args, **kwargs)

        return noted

    envs.reset, envs.step = noting("reset", envs.reset), noting("step", envs.step)
    Player(Scripted(calls, written, decode_during_search=max_steps), envs).rollout([0, 1], seed=(0,))
    # Either of the two that go on at once may be noted first.
    step = {("step", "beside"), ("advance", 7)} if max_steps else {("step", "here")}
    ends = [("close", 0), ("close", 1)]
    expected = [{("reset", "here")}, {("open", 0)}, {("open", 1)}, {"write"}, step, {("append", 0)}, {"write"}, step]
    expected += [{each} for each in (*ends, "write")]
    found = iter(calls)
    assert [{next(found) for _ in group} for group in expected] == expected
    assert list(found) == []


@pytest.mark.parametrize("max_steps", [0, 3])
def test_the_environments_are_never_called_by_two_threads_at_once(max_steps, monkeypatch):
    # In 120 tokens some episodes have no room for another action.
    player = make_toy_player(spelling="bytes", max_tokens=120, decode_during_search=max_steps)
    held, called = threading.Lock(), set()

    def alone(name, call):
        def calling(*args, **kwargs):
            assert held.acquire(blocking=False), f"{name} was called beside another call"
            try:
                called.add((name, threading.current_thread() is threading.main_thread()))
                return call(*args, **kwargs)
            finally:
                held.release()

        return calling

    for name in ("reset", "step", "cut_off"):
        setattr(player.envs, name, alone(name, getattr(player.envs, name)))
    if max_steps == 0:
        monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread is made"))
    play(player)
    assert called == {("reset", True), ("step", max_steps == 0), ("cut_off", True)}


def test_an_error_of_a_reward_comes_out_with_its_note_and_its_traceback():
    def no_reward_today(outcome):
        raise ZeroDivisionError("no reward")

    player = make_toy_player(envs={"reward": no_reward_today}, decode_during_search=3)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="no reward") as caught:
        play(player)
    assert "question" in "".join(caught.value.__notes__)
    assert "no_reward_today" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threading.active_count() == threads
    player.envs = make_envs(5)
    assert ids_of(play(player)[0]) == ids_of(play(make_toy_player())[0]), "the engine goes on"


def test_failed_searches_are_counted_and_too_many_end_the_rollout():
    def fail():
        raise RetrieverError("no connection")

    player = make_toy_player(envs={"retriever": Searches(fail)}, decode_during_search=3)
    found, stats = play(player)
    assert stats.retriever_errors == sum(one.turns[-1].info["error"] is not None for one in found) > 3
    player.max_retriever_error_fraction = 3 / 17
    with pytest.raises(RetrieverError, match=r"4 of 17 episodes ended in a failed search.*no connection"):
        play(player)
    player.envs, player.max_retriever_error_fraction = make_envs(5), 0.0
    assert ids_of(play(player)[0]) == ids_of(play(make_toy_player())[0])


@pytest.mark.parametrize("search_fails", [False, True])
def test_an_error_of_the_engine_waits_for_the_step_and_hides_none(search_fails):
    player = make_toy_player(decode_during_search=3)
    failed, over, step, advance = threading.Event(), [], player.envs.step, player.engine.advance

    def stepping(actions):
        assert failed.wait(PATIENCE)
        over.append(step(actions))
        if search_fails:
            raise LookupError("in the step")
        return over[-1]

    def failing(max_steps):
        failed.set()
        raise MemoryError("in the engine")

    player.envs.step, player.engine.advance = stepping, failing
    with pytest.raises(LookupError if search_fails else MemoryError) as caught:
        play(player)
    assert len(over) == 1
    assert not search_fails or isinstance(caught.value.__context__, MemoryError)
    player.envs.step, player.engine.advance = step, advance
    assert ids_of(play(player)[0]) == ids_of(play(make_toy_player())[0])


# --- a whole run -----------------------------------------------------------------------------------------------------


def _told(run):
    """The transcripts without their numbers with digits behind the point, which differ in the last ones."""
    return {
        name: [json.loads(line, parse_float=lambda digits: None) for line in lines.splitlines()]
        for name, lines in run.transcripts().items()
    }


def test_a_whole_run_learns_the_same_and_goes_on_bit_for_bit(tmp_path, cache):
    settings, last = [*DGPO, "learner.precision=float64", "evaluation.num_questions=8"], KD_STEPS + DGPO_STEPS
    pausing = train(tmp_path / "pausing", cache, *settings)
    run = train(tmp_path / "run", cache, *settings, "rollout.decode_during_search=4")
    assert _told(run) == _told(pausing)
    weights = run.weights(last)
    for name, expected in pausing.weights(last).items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-9)
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / f"{last:06d}")
    resumed = resume(again)
    assert f"resuming after step {last - 2}" in resumed.out + resumed.err
    assert_same_training(run, resumed)
    assert resumed.transcripts() == run.transcripts()
