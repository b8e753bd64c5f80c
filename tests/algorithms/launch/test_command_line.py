"""Multiruns mean what is written, and a resumed run speaks of its own algorithm only."""

from __future__ import annotations

from small_runs import command

from algorithms.launch.command_line import attributes_of
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
    meanings = attributes_of(TAIDConfig)
    assert meanings["epochs"] == "Passes over the demonstrations."
    assert (
        meanings["t_start"]
        == meanings["t_end"]
        == "Ends of the line that t never falls below; t_end is also its bound."
    )
    assert "\n" not in meanings["loss_reduction"]
