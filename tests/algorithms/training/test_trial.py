"""A plan's times from a few real steps: how a trial is carried out, and what a plan makes of it."""

from __future__ import annotations

import json

import pytest
from small_runs import DGPO, SFT, TINY, command
from test_preflight import composed

from agentic_rag_env.errors import RetrieverError
from algorithms.assets import ASSETS
from algorithms.training import preflight, trial
from algorithms.training.trial import Trial, try_out


def test_every_stage_is_left_after_three_steps(tmp_path, capsys):
    config = composed(*TINY, *DGPO, "algo.warm_start.num_demonstrations=400", "algo.steps=50")
    found = try_out(config, tmp_path / "trial")
    assert not (tmp_path / "trial").exists()
    distilled, reinforced = found.stages
    assert distilled is not None
    assert reinforced is not None
    assert distilled["rollout"] == 0 < distilled["update"]
    assert min(reinforced[phase] for phase in ("rollout", "score", "update")) > 0
    # Prompts of some 20 tokens and turns behind them, 8 and 16 times in a batch.
    assert 8 * 20 < distilled["tokens"] < 8 * 512
    assert 16 * 20 < reinforced["tokens"] < 16 * 512
    assert min(found.demonstration_s, found.reading_s, found.question_s) > 0
    assert found.num_test == 60
    assert 2**28 < found.peak < 2**36
    printed = capsys.readouterr().out
    assert "collecting demonstrations (24)" in printed, "for three steps of 8, not the 400 of the run"
    assert "Trying out 3 steps of every stage." in printed


def test_a_stage_with_fewer_steps_takes_those(tmp_path):
    (stage,) = try_out(composed(*TINY, "algo=sft", *SFT, "algo.num_demonstrations=8"), tmp_path / "trial").stages
    assert stage is not None
    assert stage["update"] > 0


@pytest.mark.parametrize(("num", "tried"), [(None, 27), (100, 27), (10, 10)])
def test_a_trial_asks_for_few_demonstrations_however_many_are_wanted(num, tried):
    stage = {"name": "distillm", "batch_size": 8, "num_demonstrations": 400, "num_validation": 3}
    algo = {"name": "ppo", "warm_start": stage | {"demonstrations": {"source": "file", "num": num}}}
    short = trial._with_few_demonstrations(algo, trial._most_held_out(algo))["warm_start"]
    assert (short["num_demonstrations"], short["demonstrations"]) == (tried, {"source": "file", "num": None})


#: kd takes 0.1 s a step and dgpo 2 s; a demonstration 0.01 s, read once in 0.002 s; a question 0.05 s.
STAGES = [
    {"rollout": 0.0, "score": 0.0, "update": 0.1, "tokens": 800.0},
    {"rollout": 1.0, "score": 0.25, "update": 0.75, "tokens": 1600.0},
]


def test_a_plan_by_hand():
    config = composed(*TINY, *DGPO, "algo.warm_start.epochs=5", "algo.steps=90", "evaluation.temperatures=[0,1]")
    found = preflight.plan(config, Trial(STAGES, 0.01, 0.002, 0.05, num_test=60, peak=2**30))
    kd, dgpo = found["time"]["kd"], found["time"]["dgpo"]
    assert (kd["steps"], dgpo["steps"]) == (3 * 5, 90)
    assert kd["seconds once"] == {"demonstrations": 0.24, "teacher reads demonstrations": 0.05}
    assert found["hours"] == round((15 * 0.1 + 24 * 0.012 + 90 * 2) / 3600, 3)
    # Raw model, cold start, trained model and teacher answer 32 questions in two ways.
    assert found["evaluation hours, at most"] == round(4 * 32 * 2 * 0.05 / 3600, 3)
    assert found["trained tokens"] == 15 * 800 + 90 * 1600
    assert found["peak of the trial, GiB"] == 1


def test_a_stage_without_demonstrations_takes_no_time():
    config = composed(*TINY, *DGPO)
    found = preflight.plan(config, Trial([None, STAGES[1]], 0.0, 0.0, 0.05, num_test=60, peak=0))
    assert found["time"]["kd"]["hours"] == 0
    assert found["hours"] == round(4 * 2 / 3600, 3)


def test_the_command_tries_the_run_out(tmp_path):
    run = command(*TINY, "algo=sft", *SFT, "preflight=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 0, run.err
    found = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert found["times are"] == "of 3 steps of each stage, measured here"
    assert found["fits"]
    assert found["hardware"]["device"] == "cpu"
    assert found["models"]["policy"] == preflight.shape_of(str(ASSETS / "tiny-student")).parameters
    assert found["time"]["sft"]["steps"] == 6
    assert found["time"]["sft"]["seconds of a step"].keys() == {"rollout", "score", "update"}
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [".hydra", "preflight.json"]
    assert "Plan for 1 x cpu" in run.out
    assert "min of training and" in run.out


@pytest.mark.parametrize("setting", ["hardware.gpu=h200", "hardware.count=2", "model.policy=owner/absent"])
def test_what_does_not_run_here_is_not_tried_out(setting, tmp_path, monkeypatch, capsys):
    student = preflight.shape_of(str(ASSETS / "tiny-student"))
    monkeypatch.setattr(preflight, "shape_of", lambda place: student)
    monkeypatch.setattr(preflight, "try_out", None)
    found = preflight.preflight(composed(*TINY, *DGPO, setting), tmp_path)
    assert found["times are"] == "computed"
    absent = "owner/absent would have to be downloaded first" in capsys.readouterr().out
    assert absent == (setting == "model.policy=owner/absent")


def test_what_ends_a_trial_is_said_and_the_plan_is_computed(tmp_path, monkeypatch, capsys):
    def refused(config, folder):
        raise RetrieverError("http://127.0.0.1:8000 does not answer.")

    monkeypatch.setattr(preflight, "try_out", refused)
    found = preflight.preflight(composed(*TINY, *DGPO), tmp_path)
    assert found["times are"] == "computed"
    assert "No step could be measured: http://127.0.0.1:8000 does not answer." in capsys.readouterr().out


def test_the_files_of_a_trial_are_removed_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(trial.Trainer, "train", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_out(composed(*TINY, *DGPO), tmp_path / "trial")
    assert not (tmp_path / "trial").exists()


def test_a_trial_that_was_killed_is_not_gone_on_with(tmp_path):
    config = composed(*TINY, "algo=sft", *SFT)
    left = tmp_path / "trial" / "run" / "checkpoints" / "000003"
    left.mkdir(parents=True)
    (stage,) = try_out(config, tmp_path / "trial").stages
    assert stage is not None


def test_what_trains_no_language_model_has_no_plan(tmp_path):
    run = command("algo=maskable_ppo", "preflight=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "Only runs that train a language model can be planned; maskable_ppo trains none." in run.err
