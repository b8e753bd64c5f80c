"""Figures of episodes by hand: why they ended, and the names under which everybody logs them."""

from __future__ import annotations

import numpy as np
import pytest

from agentic_rag_env.types import Ending
from algorithms.learner.types import RolloutStats, Trajectory, Turn
from algorithms.training.costs import cost_metrics, speeds, spend, timed
from algorithms.training.episode_figures import episode_means, rollout_metrics, trajectory_metrics

IDS = np.zeros(3, dtype=np.int64)


def info(ending: Ending | None, **changes) -> dict:
    """Of a last step."""
    told = {"action": "malformed", "answer": None, "f1": 0.0, "num_searches": 1, "correct": False, "error": None}
    return told | {"ending": ending} | changes


ANSWERED = info(Ending.ANSWERED, action="answer", answer="Rome", f1=0.5, num_searches=4)
RIGHT = ANSWERED | {"f1": 1.0, "correct": True, "num_searches": 2}
FAILED = info(Ending.SEARCH_FAILED, action="search", error="no route")
LAST = [ANSWERED, RIGHT, FAILED, info(Ending.OUT_OF_TURNS), info(Ending.OUT_OF_TOKENS), info(Ending.OUT_OF_TOKENS),
        RIGHT, RIGHT]  # fmt: skip
REWARDS = [0.0, 1.0, 0.0, -0.5, 0.0, 0.0, 1.0, 1.0]


def trajectory(last: dict, reward: float = 0.0, num_turns: int = 1) -> Trajectory:
    before = [Turn(IDS, np.zeros(3, dtype=np.float32), IDS, {**last, "action": "search"})] * (num_turns - 1)
    turn = Turn(IDS[:2], np.zeros(2, dtype=np.float32), IDS[:0], last)
    answered = last["answer"] is not None
    return Trajectory(IDS, [*before, turn], 0, "policy", reward, last["correct"], answered, not answered)


def test_every_learner_logs_the_same_figures_of_its_episodes():
    expected = {
        "rollout/exact_match": 3 / 8, "rollout/reward": 2.5 / 8, "rollout/reward_variance": 3.25 / 8 - (2.5 / 8) ** 2,
        "rollout/num_searches": (4 + 3 * 2 + 4) / 8,
        "rollout/answered_fraction": 4 / 8, "rollout/search_failed_fraction": 1 / 8,
        "rollout/out_of_turns_fraction": 1 / 8, "rollout/out_of_tokens_fraction": 2 / 8,
        "rollout/truncated_fraction": 4 / 8, "rollout/retriever_errors": 1.0,
    }  # fmt: skip
    assert rollout_metrics(LAST, REWARDS) == expected
    played = [trajectory(last, reward) for last, reward in zip(LAST, REWARDS, strict=True)]
    of_policy = trajectory_metrics(played, RolloutStats(seconds=2.0, cache_hits=1, cache_misses=3))
    assert of_policy == expected | {
        "rollout/malformed_fraction": 3 / 8, "rollout/tokens_per_episode": 2.0, "rollout/cache_hit_rate": 0.25,
        "time/rollout_s": 2.0,
    }  # fmt: skip


def test_means_over_turns_and_over_episodes_are_told_apart():
    means = episode_means([trajectory(info(Ending.OUT_OF_TURNS), num_turns=3), trajectory(RIGHT)])
    assert means["malformed_fraction"] == 1 / 4
    assert means["tokens"] == (3 + 3 + 2 + 2) / 2
    assert (means["exact_match"], means["f1"], means["out_of_turns_fraction"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("last", "ending"),
    [
        (ANSWERED, Ending.ANSWERED),
        (FAILED, Ending.SEARCH_FAILED),
        (info(Ending.OUT_OF_TOKENS), None),  # an old file does not tell what ran out
    ],
)
def test_endings_of_files_from_before_the_key(last, ending):
    old = {name: value for name, value in last.items() if name != "ending"}
    assert trajectory(old).ending is ending
    assert trajectory(last | {"ending": str(last["ending"])}).ending is last["ending"]  # as JSON has it


def test_costs_add_up_and_seconds_stand_under_time():
    costs = {"episodes": 2.0}
    spend(costs, episodes=3, env_steps=1)
    with timed(costs, "dev_s") as first:
        assert first == {}
    with timed(costs, "dev_s") as second:
        pass
    assert first.keys() == second.keys() == {"time/dev_s"}
    assert costs["dev_s"] == first["time/dev_s"] + second["time/dev_s"] > 0
    assert cost_metrics(costs) == {"cost/episodes": 5.0, "cost/env_steps": 1.0}


def test_speeds_are_those_of_the_phases_that_took_place():
    before = {"rollout_s": 1.0, "sampled_tokens": 100.0, "score_s": 2.0, "update_s": 1.0, "trained_tokens": 50.0}
    after = before | {"score_s": 4.0, "update_s": 1.5, "trained_tokens": 150.0}
    assert speeds(after, before) == {"score_tokens_per_s": 50.0, "update_tokens_per_s": 200.0}
    assert speeds(after) == {"rollout_tokens_per_s": 100.0, "score_tokens_per_s": 37.5, "update_tokens_per_s": 100.0}
    assert speeds({}) == {}
