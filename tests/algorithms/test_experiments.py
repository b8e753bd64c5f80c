"""The miniature of the paper as configuration: every method composes to the stages it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from algorithms.training.build import build_stages
from algorithms.training.settings import RunConfig, register_schemas, run_config

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
STAGES = {
    "ppo": ["ppo"],
    "grpo": ["grpo"],
    "sft": ["sft"],
    "sft_ppo": ["sft", "sft_ppo"],
    "kd": ["kd"],
    "gkd": ["sft", "gkd"],
    "distillm": ["sft", "distillm"],
    "taid": ["taid"],
    "dgpo": ["kd", "dgpo"],
    "no_cold_start": ["dgpo"],
    "uniform_kl": ["kd", "dgpo"],
    "no_teacher_guidance": ["kd", "ppo"],
    "inverted_order": ["ppo", "kd"],
    "dgpo_grpo": ["kd", "dgpo_grpo"],
}


def composed(*overrides: str, hydra: bool = False):
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def run_settings(*overrides: str) -> RunConfig:
    return run_config(composed(*overrides))


def swept(experiment: str) -> dict[str, list[str]]:
    params = composed(f"+experiment={experiment}", hydra=True).hydra.sweeper.params
    return {key: str(values).split(",") for key, values in params.items()}


def test_the_experiments_cover_every_method_once_with_three_seeds():
    table, ablations = (swept(experiment)["+method"] for experiment in ("main_table", "ablations"))
    assert sorted({*table, *ablations}) == METHODS
    assert set(table) & set(ablations) == {"dgpo"}
    assert len(table) + len(ablations) == len(METHODS) + 1
    assert set(STAGES) == set(METHODS) - {"maskable_ppo"}
    for experiment in ("main_table", "ablations", "demonstrations_kd", "demonstrations_dgpo"):
        assert len(swept(experiment)["seed"]) >= 3


@pytest.mark.parametrize("method", sorted(STAGES))
def test_a_method_is_a_chain_of_algorithms_with_equal_budgets(method):
    config = run_settings("+experiment=main_table", f"+method={method}")
    stages = build_stages(config.algo)
    assert [stage.name for stage in stages] == STAGES[method]
    assert (config.threads, config.evaluation.num_questions) == (1, 600)
    epochs = [stage.config.epochs for stage in stages if "teacher" in stage.trains_on]
    # 24 passes over 400 demonstrations, or 12 and 60 rollouts of 96 episodes
    assert sum(epochs) in ((24,) if all("teacher" in stage.trains_on for stage in stages) else (0, 12))
    for stage in stages:
        if "teacher" in stage.trains_on:
            assert stage.config.num_demonstrations == 400
        else:
            assert (stage.config.steps, stage.config.batch_size) == (60, 96)


def test_each_ablation_takes_away_one_part():
    whole = run_settings("+experiment=ablations", "+method=dgpo").algo
    for method, changed in (
        ("no_cold_start", {"warm_start": None}),
        ("uniform_kl", {"selective": False}),
    ):
        assert run_settings("+experiment=ablations", f"+method={method}").algo == {**whole, **changed}
    without_teacher = run_settings("+experiment=ablations", "+method=no_teacher_guidance").algo
    assert without_teacher["warm_start"] == whole["warm_start"]


def gpu_commands() -> dict[str, list[str]]:
    """What the header of the preset says to give beside a method, by method."""
    lines = (CONF / "scale" / "gpu.yaml").read_text().splitlines()
    given = [line.split("+method=")[1].split(" ") for line in lines if line.startswith("#   ")]
    return {method: settings for methods, *settings in given for method in methods.split(",")}


def test_every_language_model_of_the_table_has_a_command_for_a_gpu():
    assert set(gpu_commands()) == set(swept("main_table")["+method"]) - {"maskable_ppo"}


@pytest.mark.parametrize(("method", "settings"), gpu_commands().items())
def test_the_same_experiment_on_a_gpu(method, settings):
    config = run_settings("+experiment=main_table", f"+method={method}", "+scale=gpu", *settings)
    assert config.model.policy == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.threads is None
    assert config.env["prompt"] == "search_r1"
    stages = build_stages(config.algo)
    assert stages[-1].config.batch_size == 240
    for stage in stages:
        assert stage.config.optimizer.learning_rate == (1e-5 if "teacher" in stage.trains_on else 1e-6)
        if "values" in stage.needs:
            assert stage.config.critic_optimizer.learning_rate == 1e-5
