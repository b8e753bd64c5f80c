"""A run directory of an older version is evaluated, compared, shown, and resumed or refused by name."""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from small_runs import Run, command

from agentic_rag_env.types import Ending
from algorithms import compare, evaluate, show
from algorithms.rollout.trajectory_files import read_trajectories
from algorithms.training.settings import RunConfig

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Run:
    """A copy of the run, seen from where it was started: it names its policy by a relative path."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Run(Path("run"))


def lacking(path: Path) -> list[str]:
    """Settings that have come since."""
    saved = OmegaConf.load(path / ".hydra" / "config.yaml")
    names = [setting.name for setting in dataclasses.fields(RunConfig)]
    sections = {
        setting.name: setting.default_factory
        for setting in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(setting.default_factory)
    }
    names += [f"{name}.{inner.name}" for name, section in sections.items() for inner in dataclasses.fields(section)]
    return [name for name in names if OmegaConf.select(saved, name, default="absent") == "absent"]


def test_it_is_small_and_names_no_machine():
    files = [file for file in OLD.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 300_000
    for file in files:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert not re.search(rb"""[\s"':=]/\w+/""", content), file


def test_it_is_evaluated_with_its_own_settings(old):
    arguments = ["evaluate", "checkpoint=run", "evaluation.num_questions=4", "evaluation.temperatures=[0]", "probes=[]"]
    with patch.object(sys, "argv", [*arguments, "threads=1", "num_envs=4", "hydra.run.dir=scored"]):
        evaluate.main()
    scored = Run(Path("scored")).summary
    assert scored["checkpoint"] == "run/checkpoints/000004"
    now, then = scored["evaluation"]["checkpoint"]["greedy"], old.summary["evaluation"]["ppo"]["greedy"]
    for group, figures in then.items():
        assert {name: now[group][name] for name in figures} == figures
    for part in ("env", "reward", "rollout"):
        assert {name: scored["config"][part][name] for name in old.summary["config"][part]} == (
            old.summary["config"][part]
        )


def test_it_is_compared(old, capsys):
    compare.main(["run", "--out", "compared"])
    assert "ppo" in capsys.readouterr().out
    assert "ppo" in Path("compared/comparison.html").read_text(encoding="utf-8")


def test_it_is_shown_and_endings_are_read_as_far_as_it_tells_them(old):
    terminal = Console(file=io.StringIO(), width=100)
    show.show(show.parser().parse_args(["run", "--num", "1"]), terminal)
    shown = terminal.file.getvalue()
    assert "NO ANSWER" in shown
    assert (old.path / show.PAGE).is_file()
    episodes = [each for file in (old.path / "trajectories").iterdir() for each in read_trajectories(file)]
    assert {each.ending for each in episodes if each.terminated} <= {Ending.ANSWERED}
    assert {each.ending for each in episodes if each.truncated} == {None}


def test_it_is_resumed_from_its_training_state_or_refused_by_name(old):
    """Interrupted after step 2, it does step 3 and 4 as the older version did."""
    last = old.path / "checkpoints" / "000004"
    expected, before = load_file(last / "model.safetensors"), old.weights(2)
    recorded = old.metrics
    shutil.rmtree(last)
    (old.path / "summary.json").unlink()
    again = command("resume=run")
    if settings := lacking(old.path):
        assert again.code == 1
        assert "The configuration lacks" in again.err
        assert any(name in again.err for name in (*settings, "allow"))
        assert "it was cut off, or is of another version" in again.err
        return
    assert again.code == 0, again.err
    assert "resuming after step 2 of 4" in again.out
    weights = old.weights(4)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)
    assert any((weights[name] - before[name]).abs().max() > 1e-4 for name in weights)
    continued = Run(old.path).metrics
    assert [row["step"] for row in continued] == [1, 2, 3, 4]
    for name in ("train/loss", "rollout/tokens_per_episode", "cost/trained_tokens"):
        assert continued[-1][name] == pytest.approx(recorded[-1][name], abs=1e-5)


def test_another_setting_is_refused_and_one_without_effect_is_not(old):
    refused = command("resume=run", "algo.kl_coef=0.5")
    assert refused.code == 1
    assert "where algo.kl_coef is 0.001, not 0.5. Leave it out" in refused.err
    if not lacking(old.path):
        taken = command("resume=run", "threads=1", "cache_dir=elsewhere", "keep_checkpoints=1")
        assert taken.code == 0, taken.err
        assert Run(old.path).summary["config"]["cache_dir"] == "elsewhere"
