"""What Python does is what the command line does: the same defaults, the same run, the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import DGPO, TINY, assert_same_run, resume
from small_runs import Run as Read

from agentic_rag_env.errors import ConfigurationError, UnknownNameError
from agentic_rag_env.registry import PLUGINS_VARIABLE
from algorithms.training import RunConfig, configure, from_python, read_run, train
from algorithms.training.compose import complete, composed, overrides_of
from algorithms.training.loggers import LOGGERS
from algorithms.training.schemas import register_schemas
from algorithms.training.settings import EvaluationConfig
from algorithms.training.threads import threads
from algorithms.training.typed import run_config

ROOT = Path(__file__).parents[3]
#: The settings of the small runs, as values.
SMALL = {
    "threads": 1, "num_envs": 16, "checkpoint_every": 2, "dataset": {"num_passages": 150, "num_questions": 60},
    "rollout": {"max_new_tokens": 24, "max_tokens": 512}, "env": {"max_turns": 2},
    "evaluation": {"num_questions": 32, "every": 2, "num_dev_questions": 8}, "probes": ["search_behaviour"],
}  # fmt: skip
SMALL_DGPO = {
    "name": "dgpo", "batch_size": 16, "num_minibatches": 2, "steps": 4, "critic_warmup_steps": 1,
    "warm_start": {"batch_size": 8, "num_demonstrations": 24, "epochs": 2},
}  # fmt: skip


def composed_like_the_command_line(*overrides: str) -> RunConfig:
    register_schemas()
    config = composed("config", [*overrides, "hydra/launcher=basic"])
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return run_config(config)


def test_a_plan_is_not_mistaken_for_a_run(tmp_path):
    with pytest.raises(ConfigurationError, match="preflight is for the command line"):
        train(configure(algo="ppo", preflight=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_run_of_a_process_begins_like_a_first_one(tmp_path, capsys):
    def work(config, run_dir):
        torch.set_num_threads(1)  # as the networks of a small policy do
        warnings.warn("kd is SKIPPED", stacklevel=1)

    with threads(2), patch.object(from_python, "_run", work), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: print(message)
        for seed in (0, 1):
            from_python.run(configure(seed=seed), tmp_path)
            assert torch.get_num_threads() == 2
    assert capsys.readouterr().out == "kd is SKIPPED\n" * 2


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_command_line():
    assert configure() == composed_like_the_command_line()
    assert complete(RunConfig()) == configure()


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"algo": SMALL_DGPO, **SMALL}, [*TINY, *DGPO]),
        (
            {"algo": {"name": "ppo", "warm_start": {"name": "sft", "epochs": 4}}, "seed": 3},
            ["algo=ppo", "algo@algo.warm_start=sft", "algo.warm_start.epochs=4", "seed=3"],
        ),
        ({"algo": {"name": "dgpo", "warm_start": None}}, ["algo.warm_start=null"]),
        ({"algo": "kd", "stages": "paper"}, ["algo=kd", "stages=paper"]),
        ({"method": "uniform_kl"}, ["+method=uniform_kl"]),
        (
            {"model": {"name": "smollm2_135m", "policy": Path("a") / "b"}, "dataset": "nq_mini"},
            ["model=smollm2_135m", "model.policy=a/b", "dataset=nq_mini"],
        ),
        ({"demonstrations": {"num": 7}}, ["demonstrations.num=7"]),
    ],
)
def test_values_mean_what_the_same_overrides_mean(values, overrides):
    config = configure(**values)
    assert config == composed_like_the_command_line(*overrides)
    assert complete(config) == config


def test_settings_made_by_hand_are_completed():
    config = complete(RunConfig(algo="sft", evaluation=EvaluationConfig(num_questions=5), seed=2))
    assert config == configure(algo="sft", evaluation={"num_questions": 5}, seed=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"retriver": "bm25"}, "There is no setting retriver. Did you mean 'retriever'?"),
        ({"sead": 3}, "There is no setting sead. Did you mean 'seed'?"),
        ({"algo": "dgppo"}, "Unknown algo 'dgppo'. Did you mean 'dgpo'?"),
        ({"algo": {"stpes": 3}}, "There is no setting algo.stpes. Did you mean 'steps'?"),
        ({"evaluation": {"evry": 3}}, "There is no setting evaluation.evry. Did you mean 'every'?"),
        ({"experiment": "papr"}, "Unknown experiment 'papr'. Did you mean 'paper'?"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'."),
        ({"logger": "jsonl"}, r"logger is a list: write logger=\[jsonl\]."),
        ({"dataset": object()}, "dataset must be a name, or a mapping with 'name' and settings, got a object."),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_few_words(values, message):
    with pytest.raises(ConfigurationError, match=message):
        configure(**values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logger=jsonl", "logger is a list: write logger=[jsonl]."),
        ("probes=reading", "probes is a list: write probes=[reading]."),
        ("evaluation.temperatures=0.5", "evaluation.temperatures is a list: write evaluation.temperatures=[0.5]."),
        ("seed=1.5", "seed must be a whole number, got 1.5."),
        ("seed=abc", "seed must be a whole number, got 'abc'."),
        ("algo.steps=1.5", "algo.steps must be a whole number, got 1.5."),
        ("algo.kl_coef=much", "algo.kl_coef must be a number, got 'much'."),
        ("evaluation.temperatures=[0.0,warm]", "evaluation.temperatures[1] must be a number, got 'warm'."),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_the_setting_wants(override, message):
    register_schemas()
    with pytest.raises(ConfigurationError) as caught:
        composed("config", [override, "hydra/launcher=basic"])
    assert str(caught.value) == message


def test_a_logger_nobody_knows_is_refused_before_any_training():
    with pytest.raises(UnknownNameError, match=r"Unknown logger 'tensorbord'. Did you mean 'tensorboard'?"):
        configure(logger=["tensorbord"])


def test_what_was_chosen_is_told_as_overrides():
    config = configure(algo={"name": "dgpo", "steps": 50, "warm_start": {"epochs": 3}}, cache_dir="elsewhere", seed=3)
    assert overrides_of(config) == [
        "algo=dgpo", "algo.warm_start=kd", "algo.warm_start.warm_start=None",
        "env=agentic_rag", "dataset=tiny", "retriever=bm25", "reward=exact_match",
        "algo.warm_start.epochs=3", "algo.steps=50", "seed=3",
    ]  # fmt: skip


def test_a_program_that_uses_hydra_itself_keeps_its_own():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("conf", version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        configure()
        assert GlobalHydra.instance().hydra is mine
        assert compose("config", ["hydra/launcher=basic"]).model.policy == "tiny-student"


def test_settings_come_without_torch():
    code = (
        "import sys; from algorithms.training import RunConfig, configure, train; configure(seed=1);"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    run_dir = tmp_path_factory.mktemp("python") / "run"
    return train(configure(algo=SMALL_DGPO, **SMALL, cache_dir=str(cache)), run_dir)


def test_the_run_is_that_of_the_command_line(trained, dgpo_run):
    assert_same_run(Read(trained.run_dir), dgpo_run)


def test_the_result_holds_summary_curves_and_checkpoints(trained):
    assert trained.summary["stages"][-1]["name"] == "dgpo"
    assert list(trained.curves) == list(range(1, 11))
    assert [trained.curves[step]["stage"] for step in (6, 7)] == ["kd", "dgpo"]
    assert list(trained.curve("dev/exact_match")) == [2, 4, 6, 8, 10]
    assert trained.exact_match("T=1") == trained.summary["evaluation"]["dgpo"]["T=1"]["all"]["exact_match"]
    last = max(trained.checkpoints)
    assert last == 10
    assert (trained.checkpoints[last] / "config.json").is_file()


def test_a_complete_run_is_read_and_other_settings_are_refused(trained, cache):
    before = (trained.run_dir / "summary.json").stat().st_mtime_ns
    again = train(configure(algo=SMALL_DGPO, **SMALL, cache_dir=str(cache)), trained.run_dir)
    assert again == read_run(trained.run_dir) == trained
    assert (trained.run_dir / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigurationError, match=r"holds a run with other settings: seed is 0 there, 1 here"):
        train(configure(algo=SMALL_DGPO, **SMALL, cache_dir=str(cache), seed=1), trained.run_dir)
    with pytest.raises(ConfigurationError, match="call train with the run's own directory"):
        train(configure(resume="somewhere"), trained.run_dir)


def test_the_command_line_goes_on_with_a_run_of_python(trained, dgpo_run):
    assert_same_run(resume(trained.run_dir), dgpo_run)


MY_LOGGER = """
import json
from dataclasses import dataclass
from algorithms.training.loggers import LOGGERS, Logger

@dataclass
class ListConfig:
    file: str = "seen.jsonl"

@LOGGERS.register("mine", ListConfig)
class Mine(Logger):
    def __init__(self, config):
        self.name = config.file

    def open(self, run_dir, start_step):
        self.file = run_dir / self.name
        self.lines = self.file.open("a")

    def write(self, step, metrics, stage):
        print(json.dumps([step, stage, metrics["train/loss"]]), file=self.lines)

    def results(self, metrics, step):
        if not (self.file.parent / "network").exists():
            raise ConnectionError("no network")
        print(json.dumps([step, "results", metrics["eval/all/exact_match"]]), file=self.lines)

    def close(self):
        self.lines.close()
"""


def test_a_logger_of_ones_own_is_one_file_and_gets_all_figures(tmp_path, cache, monkeypatch, capsys):
    """Those at the end, too: a run is complete when they were handed on."""
    (tmp_path / "mine.py").write_text(MY_LOGGER, encoding="utf-8")
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "mine.py"))
    monkeypatch.setattr(LOGGERS, "_entries", dict(LOGGERS._entries))
    monkeypatch.setattr(LOGGERS, "_plugins_loaded", None)
    algo = {"name": "sft", "batch_size": 8, "num_demonstrations": 24, "epochs": 1}
    small = {**SMALL, "probes": [], "evaluation": {"num_questions": 8, "every": 0, "temperatures": [0.0]}}
    config = configure(algo=algo, **small, cache_dir=str(cache), logger=[{"name": "mine", "file": "told.jsonl"}])
    with pytest.raises(ConnectionError):
        train(config, tmp_path / "run")
    (tmp_path / "run" / "network").touch()
    run = train(config, tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run" / "told.jsonl").read_text().splitlines()]
    assert [(step, stage) for step, stage, _ in told] == [(1, "sft"), (2, "sft"), (3, "sft"), (3, "results")]
    assert [loss for *_, loss in told[:3]] == list(run.curve("train/loss").values())
    assert told[3][2] == run.exact_match()
    assert not (tmp_path / "run" / "tb").exists()
    printed = capsys.readouterr().out
    assert f"curves:        {tmp_path}/run/metrics.jsonl\n" in printed
    assert "tensorboard" not in printed
