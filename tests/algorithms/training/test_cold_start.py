"""Rows of one seed begin alike: the same demonstrations and, bit for bit, the same cold start; other seeds do not."""

from __future__ import annotations

import pytest
import torch
from small_runs import DGPO, KD_STEPS, command, train

SMALL = ["evaluation.num_questions=8", "evaluation.every=0", "evaluation.temperatures=[0]", "probes=[]", "algo.steps=1"]


def asked(cache) -> set[str]:
    return {file.name for file in (cache / "demonstrations").glob("*.jsonl.gz")}


def same_weights(first, second, step: int) -> bool:
    mine, theirs = first.weights(step), second.weights(step)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("row", ["self_penalty", "no_penalty"])
def test_rows_of_one_seed_share_demonstrations_and_cold_start(row, dgpo_run, cache, tmp_path):
    before = asked(cache)
    run = train(tmp_path / "run", cache, f"+method={row}", *DGPO, *SMALL)
    assert asked(cache) == before, "the teacher is not asked again"
    assert [stage["name"] for stage in run.summary["stages"]] == ["kd", "dgpo"]
    assert same_weights(run, dgpo_run, KD_STEPS)


def test_another_seed_has_demonstrations_and_a_cold_start_of_its_own(dgpo_run, cache, tmp_path):
    run = train(tmp_path / "run", tmp_path / "cache", "seed=1", *DGPO, *SMALL)
    assert len(asked(tmp_path / "cache")) == 1
    assert not same_weights(run, dgpo_run, KD_STEPS)


def test_a_softened_teacher_gives_other_demonstrations_and_is_measured_as_it_is(dgpo_run, cache, tmp_path):
    before = asked(cache)
    settings = [*DGPO, "evaluation.every=0", "probes=[]", "algo.steps=1", "evaluation.num_questions=32"]
    run = train(tmp_path / "run", cache, *settings, "model.teacher_temperature=1.5")
    assert len(asked(cache) - before) == 1
    assert "teacher" not in run.summary["evaluated_before"]
    sampled = [each.summary["evaluation"]["teacher"]["T=1"]["all"]["exact_match"] for each in (run, dgpo_run)]
    assert sampled[0] < 0.8 < sampled[1]
    demonstrations = [each.summary["demonstrations"]["kd"]["asked"] for each in (run, dgpo_run)]
    assert demonstrations[0] > demonstrations[1], "it is wrong more often"


def test_a_teacher_without_heat_is_refused(tmp_path):
    run = command("model.teacher_temperature=0", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "teacher_temperature must be above 0, got 0" in run.err
