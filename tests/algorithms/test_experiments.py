"""The comparisons as configuration: what every row is made of, and that it differs in what it says and nothing else."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from algorithms.analysis.runs import flat
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.training.build import build_stages
from algorithms.training.schemas import by_group, register_schemas
from algorithms.training.settings import RunConfig
from algorithms.training.typed import run_config

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
    "no_penalty": ["kd", "dgpo"],
    "self_penalty": ["kd", "dgpo"],
    "no_teacher_guidance": ["kd", "dgpo"],
    "inverted_order": ["ppo", "kd"],
    "dgpo_grpo": ["kd", "dgpo_grpo"],
}
#: The rows that others are compared with, and the one without a language model.
BASES = {"sft", "ppo", "maskable_ppo"}
SWEEPS = ("main_table", "ablations", "kl_sweep", "real_text")
EXPERIMENTS = {name: [f"+experiment={name}"] for name in SWEEPS} | {
    "": [],
    "paper": ["+experiment=paper"],
}


def composed(*overrides: str, hydra: bool = False):
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(map(by_group, overrides)), return_hydra_config=hydra)


@cache
def run_settings(*overrides: str) -> RunConfig:
    return run_config(composed(*overrides))


def swept(experiment: str) -> dict[str, list[str]]:
    params = composed(f"+experiment={experiment}", hydra=True).hydra.sweeper.params
    return {key: str(values).split(",") for key, values in params.items()}


def said(file: Path, what: str) -> tuple[str, list[str]] | None:
    """The settings after a word in the comments of a file, and what stands before the colon."""
    found = re.search(rf"^# {what} ?(\w*): (.+)\.$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found and (found[1], [] if found[2] == "nothing" else found[2].split(", "))


def differences(mine: dict, base: dict) -> set[str]:
    """Settings that both have with other values; a setting that only one knows is part of the method itself."""
    shared = flat({key: mine[key] for key in mine.keys() & base.keys() - {"name", "warm_start"}})
    other = flat({key: base[key] for key in mine.keys() & base.keys() - {"name", "warm_start"}})
    start = {"warm_start"} if mine["warm_start"] != base["warm_start"] else set()
    return {name for name in shared if shared[name] != other[name]} | start


def test_the_experiments_cover_every_method_once():
    table, ablations = (swept(experiment)["+method"] for experiment in ("main_table", "ablations"))
    assert sorted({*table, *ablations}) == METHODS
    assert set(table) & set(ablations) == {"dgpo"}
    assert len(table) + len(ablations) == len(METHODS) + 1
    assert set(STAGES) == set(METHODS) - {"maskable_ppo"}


@pytest.mark.parametrize(
    ("experiment", "num_runs"),
    [
        ("main_table", 30),
        ("ablations", 64),
        ("ablations_long", 6),
        ("kl_sweep", 60),
        ("demonstrations_dgpo", 12),
        ("real_text", 10),
    ],
)
def test_the_jobs_of_an_experiment_compose(experiment, num_runs):
    params = swept(experiment)
    count = 1
    for values in params.values():
        count *= len(values)
    assert count == num_runs
    last = [f"{key}={values[-1]}" for key, values in params.items()]
    # in both orders: a sweep puts what it varies before the experiment
    assert run_settings(*last, f"+experiment={experiment}") == run_settings(f"+experiment={experiment}", *last)


@pytest.mark.parametrize("method", ["no_cold_start", "no_penalty", "inverted_order"])
def test_a_row_is_the_same_before_and_after_the_experiment(method):
    for experiment in ("ablations", "paper"):
        row = f"+method={method}"
        assert run_settings(row, *EXPERIMENTS[experiment]) == run_settings(*EXPERIMENTS[experiment], row)


# --- one change a row ------------------------------------------------------------------------------------------------


def rows_to_compare() -> list[tuple[str, str, str]]:
    """Each row with the row that it says it differs from, by itself and in every experiment that has both."""
    rows = {"": METHODS, "paper": METHODS}
    rows |= {experiment: swept(experiment)["+method"] for experiment in SWEEPS}
    declared = {method: said(CONF / "method" / f"{method}.yaml", "Differs from") for method in METHODS}
    assert {method for method, found in declared.items() if found is None} == BASES
    return [
        (experiment, method, declared[method][0])
        for experiment, methods in rows.items()
        for method in methods
        if declared[method] and declared[method][0] in methods
    ]


@pytest.mark.parametrize(("experiment", "method", "base"), rows_to_compare())
def test_a_row_differs_in_what_it_says_and_in_nothing_else(experiment, method, base):
    _, settings = said(CONF / "method" / f"{method}.yaml", "Differs from")
    mine, theirs = (run_settings(*EXPERIMENTS[experiment], f"+method={each}") for each in (method, base))
    assert {**vars(mine), "algo": None} == {**vars(theirs), "algo": None}
    if settings != ["the order of the stages"]:
        of_budget = {"": "ablations", "kl_sweep": "ablations"}.get(experiment, experiment)
        _, budget = said(CONF / "stages" / f"{of_budget}.yaml", "Budget")
        assert differences(mine.algo, theirs.algo) - set(budget) == set(settings) - set(budget)


def test_the_inverted_order_has_the_stages_of_the_row_that_it_inverts():
    inverted = run_settings("+experiment=ablations", "+method=inverted_order").algo
    straight = run_settings("+experiment=ablations", "+method=no_teacher_guidance").algo
    assert differences(inverted, straight["warm_start"]) == {"warm_start"}
    assert differences(inverted["warm_start"], straight) == {"warm_start"}


def test_no_teacher_guidance_is_ppo_after_kd():
    row = run_settings("+method=no_teacher_guidance").algo
    ppo = run_settings("algo=ppo", "algo.warm_start=kd").algo
    assert {key: row[key] for key in ppo if key != "name"} == {key: ppo[key] for key in ppo if key != "name"}
    assert row["selective"] is row["length_neutral"] is False


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS.names()) & set(METHODS)))
def test_a_method_named_after_its_algorithm_is_that_algorithm(name):
    assert run_settings(f"+method={name}") == run_settings(f"algo={name}")


def test_policy_gradients_share_their_defaults():
    names = ("optimizer", "batch_size", "num_minibatches", "steps", "kl_coef", "kl_clip", "clip_range", "entropy_coef")
    found = {name: run_settings(f"algo={name}").algo for name in ("ppo", "sft_ppo", "dgpo", "grpo", "dgpo_grpo")}
    assert all(each[name] == found["ppo"][name] for each in found.values() for name in names)
    for name in ("ppo", "sft_ppo", "dgpo"):
        assert (found[name]["discount"], found[name]["gae_lambda"], found[name]["kl_coef"]) == (1.0, 1.0, 0.001)


# --- budgets and regime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(STAGES) & set(swept("main_table")["+method"])))
def test_the_main_table_has_equal_budgets(method):
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


@pytest.mark.parametrize("method", swept("ablations")["+method"])
def test_the_ablations_have_one_regime(method):
    config = run_settings("+experiment=ablations", f"+method={method}")
    stages = build_stages(config.algo)
    assert [stage.name for stage in stages] == STAGES[method]
    assert config.model.teacher_temperature == 1.5
    for stage in stages:
        if "teacher" in stage.trains_on:
            assert (stage.config.num_demonstrations, stage.config.epochs) == (250, 12)
        else:
            assert (stage.config.steps, stage.config.optimizer.schedule) == (300, "constant")
            assert stage.config.kl_coef == (0.0 if method == "no_penalty" else 0.001)


@pytest.mark.parametrize("scale", sorted(file.stem for file in (CONF / "scale").glob("*.yaml")))
def test_a_scale_composes_by_itself(scale):
    assert run_settings(f"+scale={scale}") != run_settings()


def test_on_eight_gpus_rows_write_on_while_the_shared_service_searches():
    config = run_settings("+experiment=paper", "+scale=h200x8")
    assert config.retriever["name"] == "http"
    assert (config.rollout.decode_during_search, config.rollout.max_new_tokens) == (16, 500)


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
