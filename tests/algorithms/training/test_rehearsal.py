"""What an algorithm of one's own reads without declaring it is said before anything is played or trained."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from agentic_rag_env.errors import ConfigurationError
from algorithms.grpo import GRPO, GRPOConfig
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, CriticConfig
from algorithms.rollout.player import Player
from algorithms.training import configure, train
from algorithms.training.build import build_stages
from algorithms.training.rehearsal import rehearse
from algorithms.training.schemas import import_zoo

import_zoo()


class Bare(Algorithm):
    def num_steps(self, num_demonstrations):
        return 1

    def token_loss(self, tokens):
        return -tokens.logprobs


@pytest.mark.parametrize("name", [name for name in ALGORITHMS.names() if name != "maskable_ppo"])
def test_the_zoo_declares_what_it_reads(name):
    for stage in build_stages(name):
        rehearse(stage)


@pytest.mark.parametrize("setting", [{"kl_estimator": "exact"}, {"kl_coef": 0.0}, {"entropy_coef": 0.1}])
def test_so_it_does_with_other_settings(setting):
    (stage,) = build_stages({"name": "ppo", **setting})
    rehearse(stage)


def test_a_loss_that_reads_an_undeclared_network_is_refused():
    class Forgetful(Bare):
        needs = frozenset({"entropy"})

        def token_loss(self, tokens):
            return tokens.logprobs - tokens.teacher_logprobs

    with pytest.raises(
        ConfigurationError,
        match=r"^Forgetful reads teacher_logprobs, which nobody fills in, and fails \(TypeError: .*\); "
        r"declare needs = frozenset\(\{'entropy', 'teacher_logprobs'\}\)\.",
    ):
        rehearse(Forgetful(AlgorithmConfig()))


def test_so_is_a_hook_that_looks_at_the_batch():
    class Forgetful(Bare):
        def shape_rewards(self, batch):
            return super().shape_rewards(batch) - batch.ref_kl

    with pytest.raises(ConfigurationError, match=r"reads ref_kl, .* declare needs = frozenset\(\{'ref_kl'\}\)"):
        rehearse(Forgetful(AlgorithmConfig()))


def test_old_values_come_with_a_critic():
    class Clipped(Bare):
        needs = frozenset({"values"})

        def value_loss(self, tokens):
            return (tokens.values - tokens.old_values) ** 2

    rehearse(Clipped(CriticConfig()))

    class Forgetful(Bare):
        def token_loss(self, tokens):
            return tokens.logprobs * tokens.old_values

    with pytest.raises(ConfigurationError, match=r"reads old_values, .* declare needs = frozenset\(\{'values'\}\)"):
        rehearse(Forgetful(AlgorithmConfig()))


def test_advantages_come_from_a_hook():
    class Forgetful(Bare):
        def token_loss(self, tokens):
            return -tokens.logprobs * tokens.advantages

    with pytest.raises(ConfigurationError, match=r"reads advantages, .* return them from estimate_advantages"):
        rehearse(Forgetful(AlgorithmConfig()))


def test_looking_whether_a_field_is_there_is_no_fault_and_other_failures_are_left_to_the_step():
    class Careful(Bare):
        calls = 0

        def token_loss(self, tokens):
            self.calls += 1
            torch.rand(1)
            if tokens.ref_logprobs is not None:
                return tokens.ref_logprobs
            return -tokens.logprobs

    class Picky(Bare):
        def token_loss(self, tokens):
            raise ValueError("not with these numbers")

    careful, state = Careful(AlgorithmConfig()), torch.random.get_rng_state()
    rehearse(careful)
    rehearse(Picky(AlgorithmConfig()))
    assert careful.calls == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_says_so_before_it_plays(tmp_path, monkeypatch):
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))

    @ALGORITHMS.register("forgetful", GRPOConfig)
    class Forgetful(GRPO):
        def token_loss(self, tokens):
            return super().token_loss(tokens) + tokens.teacher_logprobs

    config = configure(algo={"name": "forgetful", "batch_size": 12}, dataset={"num_passages": 150}, probes=[])
    with (
        patch.object(Player, "rollout", side_effect=AssertionError("it plays")),
        pytest.raises(ConfigurationError, match="Forgetful reads teacher_logprobs, which nobody fills in"),
    ):
        train(config, tmp_path / "run")
