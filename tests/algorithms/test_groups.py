"""GRPO and its guided variant: credit within groups, and the loss written out."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import train
from test_identities import make_batch, normal

from agentic_rag_env.errors import ConfigurationError
from algorithms.dgpo_grpo import DGPOGRPO, DGPOGRPOConfig
from algorithms.grpo import GRPO, GRPOConfig
from algorithms.learner import ops
from algorithms.learner.types import Tokens
from algorithms.ppo import PPO, PPOConfig

SIX = [True, False, False, False, False, True]


def grouped(group_ids: list[int]):
    return make_batch(SIX, group_ids=torch.tensor(group_ids))


def tokens(**fields) -> Tokens:
    logits, ids = normal(6, 7, seed=0), torch.arange(6)
    logprobs = ops.gather_logprobs(logits, ids)
    return Tokens(
        **{
            "ids": ids,
            "sequence_ids": ids,
            "correct": ids % 2 == 0,
            "old_logprobs": logprobs + 0.3 * normal(6, seed=1),
            "logprobs": logprobs,
            "advantages": normal(6, seed=2),
            "entropy": ops.token_entropy(logits),
            "ref_logprobs": -normal(6, seed=3).abs(),
            "teacher_logprobs": -normal(6, seed=4).abs(),
            **fields,
        }
    )


def test_every_token_of_a_trajectory_gets_its_advantage_and_nothing_else_does():
    batch = grouped([0, 0, 0, 1, 1, 1])
    advantages, returns = GRPO(GRPOConfig()).estimate_advantages(batch)
    assert returns is None
    # rewards 1, 0, 0 of each group: mean 1/3, unbiased standard deviation sqrt(1/3)
    best, worst = (2 / 3) / (math.sqrt(1 / 3) + 1e-6), (-1 / 3) / (math.sqrt(1 / 3) + 1e-6)
    for row, expected in enumerate([best, worst, worst, worst, worst, best]):
        mask = batch.response_mask[row]
        assert advantages[row][mask].tolist() == pytest.approx([expected] * int(mask.sum()), abs=1e-12)
        assert (advantages[row][~mask] == 0).all()


@pytest.mark.parametrize(("scale", "best"), [("none", 2 / 3), ("batch", (2 / 3) / (math.sqrt(4 / 15) + 1e-6))])
def test_scale_of_the_rewards(scale, best):
    # all six: mean 1/3, variance (2 (2/3)^2 + 4 (1/3)^2) / 5 = 4/15
    advantages, _ = GRPO(GRPOConfig(scale_rewards=scale)).estimate_advantages(grouped([0, 0, 0, 1, 1, 1]))
    assert advantages[0].max().item() == pytest.approx(best, abs=1e-12)


def test_groups_of_equal_rewards_are_counted_and_teach_nothing():
    batch = grouped([7, 3, 3, 3, 3, 7])
    algorithm = GRPO(GRPOConfig())
    advantages, _ = algorithm.estimate_advantages(batch)
    assert (advantages == 0).all()
    assert algorithm.step_metrics(batch)["equal_reward_fraction"] == 1.0
    mixed = algorithm.step_metrics(grouped([0, 0, 1, 1, 2, 2]))
    assert mixed["equal_reward_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("estimator", ops.KL_ESTIMATORS)
def test_loss_written_out(estimator):
    part = tokens()
    algorithm = GRPO(GRPOConfig(kl_coef=0.7, kl_estimator=estimator, entropy_coef=0.01, clip_range=0.2))
    for loss, logprob, old, advantage, reference, entropy in zip(
        *(
            values.tolist()
            for values in (
                algorithm.token_loss(part),
                part.logprobs,
                part.old_logprobs,
                part.advantages,
                part.ref_logprobs,
                part.entropy,
            )
        ),
        strict=True,
    ):
        ratio, k1 = math.exp(logprob - old), logprob - reference
        surrogate = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        divergence = {"k1": k1, "k2": k1**2 / 2, "k3": math.exp(-k1) - 1 + k1}[estimator]
        assert loss == pytest.approx(surrogate + 0.7 * divergence - 0.01 * entropy, abs=1e-12)


def test_guided_groups_ask_the_teacher_about_wrong_answers_only():
    guided, free = DGPOGRPO(DGPOGRPOConfig(kl_coef=0.5)), GRPO(GRPOConfig(kl_coef=0.0))
    part = tokens()
    penalty = guided.token_loss(part) - free.token_loss(part)
    k3 = ops.kl_estimate(part.logprobs, part.teacher_logprobs, "k3")
    torch.testing.assert_close(penalty, torch.where(part.correct, 0.0, 0.5 * k3), rtol=0, atol=1e-12)
    ruled_out = tokens(teacher_logprobs=torch.where(part.correct, -torch.inf, part.teacher_logprobs))
    assert torch.equal(guided.token_loss(ruled_out), guided.token_loss(part))
    assert guided.needs == {"teacher_logprobs", "entropy"}


def test_the_penalty_of_groups_is_logged_as_a_sum_over_each_trajectory():
    batch = grouped([0, 0, 0, 1, 1, 1])
    for algorithm, anchor, pays in (
        (GRPO(GRPOConfig(kl_coef=0.5)), batch.ref_logprobs, torch.ones(6, dtype=torch.bool)),
        (DGPOGRPO(DGPOGRPOConfig(kl_coef=0.5)), batch.teacher_logprobs, ~batch.correct),
    ):
        k1 = batch.old_logprobs - anchor
        paid = 0.5 * (((-k1).exp() - 1 + k1) * batch.response_mask).sum(1) * pays
        metrics = algorithm.step_metrics(batch)
        assert metrics["penalty_mean"] == pytest.approx(paid.mean().item(), abs=1e-9)
        assert metrics["penalty_variance"] == pytest.approx(paid.var(correction=0).item(), rel=1e-9)


def test_with_the_same_advantages_and_no_divergence_grpo_is_ppo():
    part = tokens()
    loss = GRPO(GRPOConfig(kl_coef=0.0)).token_loss(part)
    assert torch.equal(loss, PPO(PPOConfig()).token_loss(part))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rollouts_per_prompt": 1}, "rollouts_per_prompt must be at least 2, got 1"),
        ({"scale_rewards": "std"}, "scale_rewards must be one of group, batch, none, got 'std'"),
        ({"kl_estimator": "exact"}, "kl_estimator must be one of k1, k2, k3, got 'exact'"),
    ],
)
def test_grpo_refuses(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        GRPOConfig(**setting)


def test_a_run_plays_each_question_several_times(tmp_path, cache, monkeypatch):
    asked = []
    shape = GRPO.shape_rewards

    def record(self, batch):
        prompts = [
            row[: int(mask.int().argmax())].tolist()
            for row, mask in zip(batch.input_ids, batch.response_mask, strict=True)
        ]
        asked.append((prompts, batch.group_ids.tolist(), batch.old_logprobs.tolist()))
        return shape(self, batch)

    monkeypatch.setattr(GRPO, "shape_rewards", record)
    settings = ("algo.batch_size=12", "algo.num_minibatches=2", "algo.steps=3", "algo.rollouts_per_prompt=4")
    run = train(tmp_path / "run", cache, "algo=grpo", *settings)
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert all(row["train/equal_reward_fraction"] <= 1 for row in run.metrics)
    assert run.summary["costs"]["episodes"] == 36
    prompts = set()
    for ids, groups, logprobs in asked[-3:]:  # the run has rehearsed before on made-up numbers
        assert groups == [0] * 4 + [1] * 4 + [2] * 4
        assert len({tuple(row) for row in ids[:4]}) == 1  # the same question
        assert len({tuple(row) for row in logprobs[:4]}) > 1  # played differently
        prompts |= {tuple(row) for row in ids}
    assert len(prompts) == 9  # three questions a step, never the same again within a pass
