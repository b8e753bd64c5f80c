"""Means over episodes, computed here for rollouts, checks on the dev split and evaluations of every learner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentic_rag_env.types import Ending, StepInfo
from algorithms.learner.types import RolloutStats, Trajectory


def outcome_means(last: Sequence[StepInfo]) -> dict[str, float]:
    """Compute means over episodes from the infos of their last steps.

    Args:
        last: Info of each episode's last step; at least one.

    Returns:
        `exact_match`, `f1`, `num_searches`, and for each `Ending` the share of episodes, `<ending>_fraction`. In files
        of older versions some episodes have no known ending, so these shares do not add up to 1.
    """
    endings = [Ending.of(info) for info in last]
    return {
        "exact_match": float(np.mean([info["correct"] for info in last])),
        "f1": float(np.mean([info["f1"] for info in last])),
        "num_searches": float(np.mean([info["num_searches"] for info in last])),
        **{f"{ending}_fraction": endings.count(ending) / len(endings) for ending in Ending},
    }


def episode_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Compute `outcome_means`, `malformed_fraction` (the mean over turns) and `tokens` (those that the model wrote)."""
    actions = [turn.info["action"] for trajectory in trajectories for turn in trajectory.turns]
    return {
        **outcome_means([trajectory.turns[-1].info for trajectory in trajectories]),
        "malformed_fraction": actions.count("malformed") / len(actions),
        "tokens": float(np.mean([trajectory.num_action_tokens for trajectory in trajectories])),
    }


def dev_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Figures that a check on the dev split logs."""
    figures = episode_means(trajectories)
    return {f"dev/{name}": figures[name] for name in ("exact_match", "num_searches", "malformed_fraction")}


def rollout_metrics(last: Sequence[StepInfo], rewards: Sequence[float]) -> dict[str, float]:
    """Figures that every learner logs of the episodes of one rollout.

    Args:
        last: Info of each episode's last step; at least one.
        rewards: Sum of the rewards of each episode.
    """
    means = outcome_means(last)
    del means["f1"]
    return {
        **{f"rollout/{name}": mean for name, mean in means.items()},
        "rollout/reward": float(np.mean(rewards)),
        "rollout/reward_variance": float(np.var(rewards)),
        "rollout/truncated_fraction": float(np.mean([Ending.of(info) is not Ending.ANSWERED for info in last])),
        "rollout/retriever_errors": float(sum(Ending.of(info) is Ending.SEARCH_FAILED for info in last)),
    }


def trajectory_metrics(trajectories: Sequence[Trajectory], stats: RolloutStats) -> dict[str, float]:
    """Figures logged of the policy's rollout: `rollout_metrics`, and what only trajectories and the player know."""
    means = episode_means(trajectories)
    num_cached = stats.cache_hits + stats.cache_misses
    last, rewards = zip(*((trajectory.turns[-1].info, trajectory.reward) for trajectory in trajectories), strict=True)
    return {
        **rollout_metrics(last, rewards),
        "rollout/malformed_fraction": means["malformed_fraction"],
        "rollout/tokens_per_episode": means["tokens"],
        **({"rollout/cache_hit_rate": stats.cache_hits / num_cached} if num_cached else {}),
        "time/rollout_s": stats.seconds,
    }
