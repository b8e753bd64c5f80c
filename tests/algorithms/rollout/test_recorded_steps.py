"""Steps at few shapes and fixed places write what the naive engine writes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from naive_engine import NaiveEngine
from toy_policy import SPELLINGS, make_envs, make_policy, make_tokenizer

from agentic_rag_env.actions import CLOSING_TAGS
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.kv_cache import EpisodeCache
from algorithms.rollout.player import Player
from algorithms.rollout.recorded_steps import RecordedSteps, unrecorded

SETTINGS = {"max_new_tokens": 16, "max_tokens": 300}


def play(engine, spelling, num_rows, num_episodes=11, **settings):
    config = RolloutConfig(**{**SETTINGS, **settings})
    model, tokenizer = make_policy(spelling, seed=4), make_tokenizer(spelling)
    player = Player(engine(model, tokenizer, config, num_rows=num_rows, action_ends=CLOSING_TAGS), make_envs(num_rows))
    return player.rollout(np.arange(num_episodes) % 8, seed=(1, 2))[0]


def recording(shapes):
    """An engine whose steps have round shapes; each that is met is noted."""

    def make(*args, **kwargs):
        engine = CachedEngine(*args, **kwargs, recorder=lambda: unrecorded)
        draw = engine._draw

        def noting(inputs, length):
            shapes.append((inputs.shape[1], length))
            return draw(inputs, length)

        engine._draw = noting
        return engine

    return make


@pytest.mark.parametrize("num_rows", [1, 3, 7])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_episodes_are_those_of_the_naive_engine(spelling, temperature, num_rows):
    shapes: list[tuple[int, int]] = []
    expected = play(NaiveEngine, spelling, num_rows, temperature=temperature)
    found = play(recording(shapes), spelling, num_rows, temperature=temperature)
    for ours, naive in zip(found, expected, strict=True):
        assert len(ours.turns) == len(naive.turns)
        for one, other in zip(ours.turns, naive.turns, strict=True):
            assert one.action_ids.tolist() == other.action_ids.tolist()
            assert one.observation_ids.tolist() == other.observation_ids.tolist()
            np.testing.assert_allclose(one.action_logprobs, other.action_logprobs, atol=1e-4)
    assert {width for width, _ in shapes} <= {1: {1}, 3: {1, 2, 3}, 7: {2, 4, 7}}[num_rows]
    assert {length for _, length in shapes} <= {38, 75, 150, 300}


def test_an_episode_may_fill_the_cache_to_the_last_column():
    """Rows that wait at full length are computed beside others, and keep what they have."""
    settings = {"max_tokens": 75, "max_new_tokens": 60, "temperature": 1.0}
    shapes: list[tuple[int, int]] = []
    expected = play(NaiveEngine, "bytes", 4, **settings)
    found = play(recording(shapes), "bytes", 4, **settings)
    assert [[turn.action_ids.tolist() for turn in each.turns] for each in found] == [
        [turn.action_ids.tolist() for turn in each.turns] for each in expected
    ]
    assert max(length for _, length in shapes) == 75


def test_shapes_are_recorded_once_and_anew_when_the_cache_has_moved():
    cache, recorders, recorded, computed = EpisodeCache(8, 4096), [], [], []

    def recorder():
        number = len(recorders)

        def record(compute):
            compute()
            recorded.append((number, *computed[-1]))
            return compute

        recorders.append(record)
        return record

    steps = RecordedSteps(cache, 4096, recorder, torch.device("cpu"))

    def compute(inputs, length):
        computed.append((inputs.shape[1], length))
        return inputs[:2]

    def draw(number, *lengths):
        running = np.stack([np.arange(number) + 100, np.array(lengths[:number]), np.zeros(number, dtype=np.int64)])
        return steps.draw(compute, running, np.array(lengths)).tolist()

    for _ in range(2):
        assert draw(2, 500, 511, 0, 0, 0, 0, 0, 0) == [[100, 101], [500, 511]]
        assert computed[-1] == (2, 512)
        assert draw(2, 500, 510, 0, 0, 4000, 0, 0, 0) == [[100, 101], [500, 510]]
        assert computed[-1] == (2, 512), "the long row isn't computed"
        assert draw(3, 5, 6, 7, 600, 4000, 0, 0, 0) == [[100, 101, 102], [5, 6, 7]]
        assert computed[-1] == (4, 1024), "a row beside them is"
        draw(5, 1, 1, 1, 1, 4095, 9, 9, 9)
        assert computed[-1] == (8, 4096)
    assert recorded == [(0, 2, 512), (0, 4, 1024), (0, 8, 4096)]
    assert not cache.stored
    backbone = make_policy("whole").base_model
    with torch.no_grad():
        cache.forward(backbone, torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None], length=3)
    draw(2, 5, 5, 0, 0, 0, 0, 0, 0)
    assert cache.stored[0].shape[2] >= 512
    draw(2, 5, 5, 0, 0, 0, 0, 0, 0)
    assert recorded[3:] == [(1, 2, 512)], "by another recorder, whose memory nothing was recorded into"


def test_a_step_reads_the_tokens_that_the_step_before_drew():
    """Also where recording computes it twice."""

    def record(compute):
        compute()
        return compute

    steps = RecordedSteps(EpisodeCache(4, 8), 8, lambda: record, torch.device("cpu"))

    def draw(places_before, *last):
        running = np.stack([np.array(last), np.ones_like(last), np.zeros_like(last)])
        drawn = steps.draw(lambda inputs, length: inputs[:2] * 2, running, np.ones(4, dtype=np.int64), places_before)
        return drawn[0].tolist()

    assert draw(None, 10, 20, 30) == [20, 40, 60]
    assert draw(np.array([2, 0]), 7, 7) == [120, 40]
    assert draw(np.array([1]), 7) == [80], "of the step before, not of an earlier one"
    assert draw(None, 5, 6) == [10, 12]


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_token_too_many_is_neither_taken_nor_counted(num_rows):
    """Recorded steps are read one step late; rows that have ended by then are computed once more."""
    policy, computed, counts = make_policy("whole", seed=4), [], {}
    for recorder in (None, lambda: unrecorded):
        config = RolloutConfig(**SETTINGS)
        settings = {"num_rows": num_rows, "action_ends": CLOSING_TAGS, "recorder": recorder}
        engine = CachedEngine(policy, make_tokenizer("whole"), config, **settings)
        written = Player(engine, make_envs(num_rows)).rollout(np.arange(9) % 8, seed=(1, 2))[0]
        computed.append(engine.computed_tokens)
        counts[recorder is None] = [len(turn.action_ids) for episode in written for turn in episode.turns]
    assert counts[True] == counts[False]
    assert computed[0] == computed[1]


def test_there_are_at_most_twelve_shapes():
    for num_rows in (1, 2, 3, 64, 512):
        for max_length in (2, 40, 4096):
            steps = RecordedSteps(EpisodeCache(num_rows), max_length, lambda: unrecorded, torch.device("cpu"))
            assert len(steps._widths) * len(steps._lengths) <= 12
            assert (steps._widths[-1], steps._lengths[-1]) == (num_rows, max_length)
            for sizes in (steps._widths, steps._lengths):
                assert all(small < large <= 2 * small for small, large in pairwise(sizes))
