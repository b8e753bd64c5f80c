"""Weights & Biases receives what the other loggers receive; no network is needed to see that."""

from __future__ import annotations

import sys
import types

import pytest

from agentic_rag_env.errors import ConfigurationError
from algorithms.training import configure
from algorithms.training.loggers import LOGGERS, wandb
from algorithms.training.run_logger import RunLogger, write_results


class FakeRun:
    def __init__(self, given):
        self.given, self.logged, self.axes, self.finished = given, [], {}, False
        self.config, self.summary = FakeConfig(), {}

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        self.finished = True


class FakeConfig(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change  # a resumed run may have other settings without effect
        super().update(values)


@pytest.fixture
def runs(monkeypatch):
    """The runs that a stand-in for the library was asked for."""
    begun: list[FakeRun] = []

    def init(**given):
        begun.append(FakeRun(given))
        return begun[-1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Html = init, lambda page, inject: ("html", page, inject)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb, "find_spec", lambda name: name)
    return begun


def test_numbers_settings_texts_and_results_arrive(runs, tmp_path):
    spec = [{"name": "wandb", "project": "mine", "mode": "offline"}]
    with RunLogger(tmp_path / "run", 2, loggers=spec, settings={"algo": {"name": "kd"}}, command="run algo=kd") as log:
        log.write(1, {"train/loss": 0.5}, "kd")
        log.text("transcripts/dev", "<search> a & b \ud83d", 1)
    write_results(tmp_path / "run", spec, {"eval/all/exact_match": 0.25}, 1)
    training, results = runs
    expected = {"project": "mine", "entity": None, "name": "run", "mode": "offline", "resume": "allow"}
    assert {key: training.given[key] for key in expected} == expected
    assert training.given["dir"] == str(tmp_path / "run")
    assert training.axes == {"*": "train_step"}
    assert training.config == {"algo": {"name": "kd"}, "command": "run algo=kd"}
    assert training.logged[0] == {"train/loss": 0.5, "stage": "kd", "train_step": 1}
    shown = ("html", "<pre>&lt;search&gt; a &amp; b \\ud83d</pre>", False)
    assert training.logged[1] == {"transcripts/dev": shown, "train_step": 1}
    assert results.summary == {"eval/all/exact_match": 0.25}
    assert (training.finished, results.finished) == (True, True)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_resumed_run_goes_on_as_the_same_run_there(runs, tmp_path):
    for start in (0, 1):
        RunLogger(tmp_path / "run", 2, start_step=start, loggers=["wandb"]).close()
    RunLogger(tmp_path / "another", 2, loggers=["wandb"]).close()
    first, resumed, other = (run.given["id"] for run in runs)
    assert first == resumed != other


def test_without_the_library_the_extra_is_named_before_any_training(monkeypatch):
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs the library wandb: pip install 'agentic-rag-env\[wandb\]'"):
        configure(logger=["wandb"])


def test_settings_that_cannot_work(runs):
    with pytest.raises(ConfigurationError, match="mode must be one of online, offline, disabled, got 'of'"):
        LOGGERS.build({"name": "wandb", "mode": "of"})
    with pytest.raises(ConfigurationError, match=r"has no setting 'projct'. Did you mean 'project'?"):
        LOGGERS.build({"name": "wandb", "projct": "x"})


def test_the_library_itself_takes_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = [{"name": "wandb", "mode": "offline"}]
    with RunLogger(tmp_path / "run", 2, loggers=spec, settings={"seed": 0}) as logger:
        logger.write(1, {"train/loss": 0.5}, "kd")
        logger.text("transcripts/dev", "<search>", 1)
    write_results(tmp_path / "run", spec, {"eval/all/exact_match": 0.25}, 1)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 2
