"""Multiruns mean what is written, and a resumed run speaks of its own algorithm only."""

from __future__ import annotations

import sys

import pytest
from small_runs import command

from agentic_rag_env.settings import meanings_of
from algorithms import ask
from algorithms.taid import TAIDConfig


def test_a_resumed_run_is_told_about_its_own_settings(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("seed: 0\nalgo: {name: sft, epochs: 2}\n")
    run = command(f"resume={tmp_path}", "algo.epochs=3")
    assert (run.code, "algo.epochs is 2, not 3" in run.err, "DGPO" in run.err) == (1, True, False)
    run = command(f"resume={tmp_path}", "algo.epoch=3")
    assert f"The run in {tmp_path} has no setting algo.epoch. Did you mean 'epochs'?" in run.err


def test_a_setting_that_no_job_of_a_multirun_has_is_refused(tmp_path):
    run = command("-m", "algo=kd,sft", "algo.epoch=2", f"hydra.sweep.dir={tmp_path}")
    assert run.code == 1
    assert "No job of the multirun takes a setting: There is no setting algo.epoch. Did you mean 'epochs'?" in run.err
    assert "DGPO" not in run.err


def test_what_a_setting_means_is_read_from_the_docstrings_of_its_class_and_bases():
    meanings = meanings_of(TAIDConfig)
    assert meanings["epochs"] == "Passes over the demonstrations."
    assert (
        meanings["t_start"]
        == meanings["t_end"]
        == "Ends of the line that t never falls below; t_end is also its bound."
    )
    assert "\n" not in meanings["loss_reduction"]


@pytest.mark.parametrize("words", [(), ("--cfg", "job"), ("-c", "hydra")])
def test_a_typo_has_the_same_answer_where_settings_are_only_printed(words):
    assert "There is no setting algo.stepz. Did you mean 'steps'?" in command(*words, "algo.stepz=3").err


def test_a_setting_that_is_forced_upon_a_part_is_refused_if_the_part_lacks_it(tmp_path):
    run = command("algo=ppo", "++algo.epohcs=2", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "There is no setting algo.epohcs." in run.err
    assert not (tmp_path / "run").exists()
    run = command("algo=dgpo", "++algo.epochs=2", f"hydra.run.dir={tmp_path / 'run'}")
    assert "There is no setting algo.epochs, but the stage before has it: algo.warm_start.epochs." in run.err


@pytest.mark.parametrize(
    ("setting", "kept"), [("epochs", ("kd",)), ("critic_warmup_steps", ("dgpo",)), ("kl_cof", None)]
)
def test_jobs_of_another_launcher_take_the_settings_that_they_have(setting, kept, tmp_path, monkeypatch):
    """A basic launcher runs the jobs in this process, as submitit runs them in others."""
    seen = []
    monkeypatch.setattr("algorithms.run.run", lambda config, run_dir: seen.append(config.algo))
    words = ["-m", "hydra/launcher=basic", "algo=kd,dgpo", f"algo.{setting}=2", f"hydra.sweep.dir={tmp_path}"]
    run = command(*words)
    if kept is None:
        assert (run.code, seen) == (1, [])
        assert "Did you mean 'kl_coef'?" in run.err
        return
    assert run.code == 0, run.err
    assert [algo["name"] for algo in seen] == ["kd", "dgpo"]
    assert tuple(algo["name"] for algo in seen if algo.get(setting) == 2) == kept


def test_help_fits_a_screen_and_tells_of_the_parts_of_the_command_only(capsys, monkeypatch):
    shown = command("--help").out
    assert max(map(len, shown.splitlines())) <= 120
    assert "  logger: jsonl, tensorboard, wandb; several as logger=[jsonl,wandb]" in shown
    assert "  dataset: 2wikimultihopqa, bamboogle, benchmark, " in shown, "presets are choices like any other"
    assert "  model: llama3_8b_1b, qwen2.5_0.5b, " in shown
    meant = command("--help", "env").out
    assert 'env.prompt=bare  # "bare": the question alone.' in meant
    assert all("  # " in line for line in meant.splitlines()), "each setting has a meaning"
    monkeypatch.setattr(sys, "argv", ["ask", "--help"])
    with pytest.raises(SystemExit):
        ask.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Ask a trained agent, and watch it think, search and answer."
    assert "  question=null  # A question in plain words; None: questions are typed one after the other." in lines
    assert not any(line.startswith("  algo:") for line in lines)
    assert max(map(len, lines)) <= 120
