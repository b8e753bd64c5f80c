"""Model presets: what they bring, what wins over them, and who is warned."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hydra.core.config_store import ConfigStore
from small_runs import command
from test_experiments import run_settings

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig
from algorithms.learner.config import CriticConfig, OptimizerConfig
from algorithms.ppo import PPO, PPOConfig
from algorithms.training import presets
from algorithms.training.build import build_stages
from algorithms.training.compose import complete, configure

PRESETS = sorted(file.stem for file in presets.FOLDER.glob("*.yaml") if file.stem != "tiny")


@pytest.fixture
def own_algorithms(monkeypatch):
    """Forgets afterwards the algorithms that a test registers."""

    def copied(node):
        return {name: copied(each) for name, each in node.items()} if isinstance(node, dict) else node

    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))
    monkeypatch.setattr(ConfigStore.instance(), "repo", copied(ConfigStore.instance().repo))


def test_a_preset_is_enough():
    config = run_settings("algo=sft", "model=smollm2_135m", "dataset=nq_mini")
    assert config.model.policy == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config.env["prompt"], config.env["top_k"], config.env["max_observation_tokens"]) == ("search_r1", 1, 128)
    assert (config.rollout.max_new_tokens, config.learner.micro_batch_tokens) == (64, 3072)
    assert (config.algo["epochs"], config.algo["batch_size"]) == (2, 8)
    assert config.algo["optimizer"]["learning_rate"] == 2e-4
    assert (config.evaluation.num_questions, config.probes) == (100, ["search_behaviour"])


def test_imitation_policy_gradients_and_critics_get_rates_of_their_own():
    config = run_settings("algo=dgpo", "model=smollm2_135m")
    cold_start, dgpo = build_stages(config.algo)
    assert cold_start.config.optimizer.learning_rate == 2e-4
    assert dgpo.config.optimizer.learning_rate == 3e-5
    assert dgpo.config.critic_optimizer.learning_rate == 1e-4
    assert list(dgpo.config.optimizer.betas) == [0.9, 0.99], "what the preset does not say stays"


def test_a_warm_start_of_any_chain_gets_the_preset():
    config = run_settings("algo=ppo", "algo.warm_start=gkd", "algo.warm_start.warm_start=kd", "model=smollm2_135m")
    rates = {stage.name: stage.config.optimizer.learning_rate for stage in build_stages(config.algo)}
    assert rates == {"kd": 2e-4, "gkd": 2e-4, "ppo": 3e-5}
    assert config.algo["warm_start"]["warm_start"]["batch_size"] == 8


def test_an_algorithm_of_ones_own_gets_the_preset(own_algorithms):
    @dataclass(kw_only=True)
    class OwnConfig(CriticConfig):
        """Settings."""

        steps: int = 3

    ALGORITHMS.register("own", OwnConfig)(type("Own", (PPO,), {}))
    found = presets.of_algorithms()["qwen2.5_0.5b-own"]
    assert (found["batch_size"], float(found["optimizer"]["learning_rate"])) == (240, 1e-6)
    assert float(found["critic_optimizer"]["learning_rate"]) == 1e-5
    assert "clip_range" not in found


def test_an_algorithm_of_ones_own_gets_the_stages_of_the_one_that_it_extends(own_algorithms):
    @dataclass(kw_only=True)
    class OwnConfig(PPOConfig):
        """Settings.

        Attributes:
            bonus: Of its own.
        """

        bonus: float = 0.5

    own = ALGORITHMS.register("own_ppo", OwnConfig)(type("Own", (PPO,), {}))
    ALGORITHMS.register("owner_ppo", OwnConfig)(type("Owner", (own,), {}))
    for stages in ("paper", "real_text", "main_table"):
        ppo = run_settings("algo=ppo", f"stages={stages}").algo
        assert ppo != run_settings("algo=ppo").algo
        for name in ("own_ppo", "owner_ppo"):
            assert run_settings(f"algo={name}", f"stages={stages}").algo == {**ppo, "name": name, "bonus": 0.5}
    ppo, mine = (run_settings(f"algo={name}", "+experiment=paper").algo for name in ("ppo", "own_ppo"))
    assert mine == {**ppo, "name": "own_ppo", "bonus": 0.5}
    assert (mine["optimizer"]["learning_rate"], mine["batch_size"], mine["steps"]) == (1e-6, 512, 1000)
    start = run_settings("algo=sft", "algo.warm_start=own_ppo", "+experiment=paper").algo["warm_start"]
    assert start["critic_optimizer"] == ppo["critic_optimizer"]


def test_an_algorithm_that_no_stages_know_is_named_once(own_algorithms, capsys):
    @dataclass(kw_only=True)
    class LoneConfig(AlgorithmConfig):
        """Settings."""

        steps: int = 3

    ALGORITHMS.register("lone", LoneConfig)(type("Lone", (Algorithm,), {}))
    ALGORITHMS.register("half", LoneConfig)(type("Half", (PPO,), {}))  # without the settings of PPO
    place = "algo.warm_start"
    for name in ("lone", "half"):
        assert configure(algo={"name": "ppo", "warm_start": name}, stages="paper").algo["warm_start"]["steps"] == 3
        assert capsys.readouterr().out.splitlines() == [
            f"stages=paper says nothing of {place}={name}, nor of an algorithm whose settings it extends: it keeps its "
            f"own. Give those that a real model needs, such as {place}.optimizer.learning_rate=1e-6."
        ]
    configure(algo="lone")
    configure(algo="dgpo", stages="paper")
    configure(algo="maskable_ppo", stages="main_table")
    assert capsys.readouterr().out == ""


def test_chosen_stages_win_over_the_preset():
    config = run_settings("algo=dgpo", "model=smollm2_135m", "stages=main_table")
    cold_start, dgpo = build_stages(config.algo)
    assert (cold_start.config.epochs, cold_start.config.optimizer.learning_rate) == (12, 3e-3), "those of the stages"
    assert (dgpo.config.steps, dgpo.config.batch_size) == (60, 48), "the second is the preset's"


def test_the_command_line_and_experiments_win():
    own = ["algo.epochs=5", "env.prompt=bare", "rollout.max_new_tokens=48"]
    config = run_settings("algo=sft", "model=smollm2_135m", *own)
    assert (config.algo["epochs"], config.env["prompt"], config.rollout.max_new_tokens) == (5, "bare", 48)
    config = run_settings("+experiment=paper", "model=smollm2_135m")
    assert (config.env["top_k"], config.rollout.max_new_tokens) == (3, 500)
    assert config.algo["optimizer"]["learning_rate"] == 1e-6
    assert config.algo["warm_start"]["optimizer"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("chosen", [{"model": "qwen2.5_0.5b"}, {"stages": "paper"}])
def test_demonstrations_num_wins_over_the_number_of_presets_and_stages(chosen):
    config = configure(algo={"name": "sft", "demonstrations": {"num": 100}}, **chosen)
    assert [stage.config.num_demonstrations for stage in build_stages(config.algo)] == [100]
    assert complete(config) == config


def test_two_numbers_of_demonstrations_of_the_user_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"algo\.num_demonstrations=9 and algo\.demonstrations\.num=7 say"):
        configure(algo={"name": "kd", "num_demonstrations": 9, "demonstrations": {"num": 7}})
    two = ["algo.warm_start.num_demonstrations=9", "algo.warm_start.demonstrations.num=7"]
    refused = command("algo=dgpo", *two, f"hydra.run.dir={tmp_path}/run")
    assert refused.code == 1
    assert "algo.warm_start.num_demonstrations=9 and algo.warm_start.demonstrations.num=7 say different" in refused.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError, match=r"kd has demonstrations\.num=7 of its own"):
        configure(algo={"name": "kd", "demonstrations": {"num": 7}}, demonstrations={"num": 9})


def test_the_toy_is_as_it_was():
    config = run_settings("algo=sft")
    assert (config.env["prompt"], config.rollout.max_new_tokens) == ("bare", 48)
    assert config.algo["optimizer"]["learning_rate"] == 3e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algorithm", ["sft", "ppo", "dgpo", "grpo", "maskable_ppo"])
def test_no_preset_leaves_a_real_model_with_the_settings_of_the_toy(preset, algorithm):
    config = run_settings(f"algo={algorithm}", f"model={preset}")
    assert config.env["prompt"] == "search_r1"
    if algorithm != "maskable_ppo":
        assert presets.toy_settings(config, build_stages(config.algo), 135_000_000) is None


def test_a_real_model_that_meets_the_settings_of_the_toy_is_told_once_which_preset_helps():
    optimizer = OptimizerConfig(learning_rate=3e-3)
    stage = SimpleNamespace(name="sft", config=SimpleNamespace(optimizer=optimizer))
    config = run_settings("algo=sft")
    said = presets.toy_settings(config, [stage], 135_000_000)
    assert said is not None
    for part in ("135M", "0.003 of sft", "env.prompt=bare", "max_new_tokens=48", "model=smollm2_135m", "qwen2.5_0.5b"):
        assert part in said
    assert presets.toy_settings(config, [stage], 200_000) is None


def test_the_learning_rate_of_a_toys_critic_is_named_too():
    slow, fast = OptimizerConfig(learning_rate=1e-6), OptimizerConfig(learning_rate=1.5e-3)
    stage = SimpleNamespace(name="ppo", config=SimpleNamespace(optimizer=slow, critic_optimizer=fast))
    said = presets.toy_settings(run_settings("+experiment=paper"), [stage], 500_000_000)
    assert said is not None
    assert "made for a network of 0.2M: learning rate 0.0015 of the critic of ppo." in said
