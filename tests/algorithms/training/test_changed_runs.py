"""A run that was changed between two sittings, or whose state holds more than data, is refused with a way on."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from small_runs import DGPO_STEPS, KD_STEPS, PPO, SFT, TINY, command, train

from algorithms.training.checkpoint import MANIFEST, TRAINING_STATE, _write_manifest
from algorithms.training.trainer import Trainer

STEPS = KD_STEPS + DGPO_STEPS


@pytest.fixture
def run(dgpo_run, tmp_path):
    """A copy of a run that has still to be measured."""
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    (path / "summary.json").unlink()
    return path


@pytest.mark.parametrize(
    ("saved", "edited", "said"),
    [
        ("  clip_range: 0.2\n", "  clip_range: 0.3\n", "algo.clip_range was 0.2 and is 0.3"),
        ("max_new_tokens: 24", "max_new_tokens: 25", "rollout.max_new_tokens was 24 and is 25"),
    ],
)
def test_settings_that_were_edited_are_noticed(run, saved, edited, said):
    file = run / ".hydra" / "config.yaml"
    text = file.read_text()
    assert saved in text
    file.write_text(text.replace(saved, edited))
    again = command(f"resume={run}")
    assert again.code == 1
    assert f"{file} was changed since checkpoint {STEPS:06d} was saved: {said}." in again.err
    assert "Change it back to go on; or begin a new run from these weights: model.policy=" in again.err


def test_demonstrations_that_were_edited_are_noticed(tmp_path):
    turns, cache = tmp_path / "turns.jsonl.gz", tmp_path / "cache"
    brief = ["evaluation.every=0", "evaluation.num_questions=8", "probes=[]"]
    train(tmp_path / "taught", cache, "algo=sft", *SFT, *brief)
    (of_teacher,) = (cache / "demonstrations").glob("*.jsonl.gz")
    kept = of_teacher.read_bytes()
    turns.write_bytes(kept)
    file = ["model.teacher=null", "algo.demonstrations.source=file", f"algo.demonstrations.path={turns}"]
    run = train(tmp_path / "run", cache, "algo=sft", *SFT, *file, *brief)
    assert run.summary["costs"]["teacher_sampled_tokens"] == 0, "no model of this run wrote them"
    (run.path / "summary.json").unlink()
    turns.write_bytes(gzip.compress(b"\n".join(gzip.decompress(kept).splitlines()[1:])))
    again = command(f"resume={run.path}")
    assert again.code == 1
    assert "The demonstrations were changed since checkpoint 000006 was saved. Change them back to go on" in again.err
    turns.write_bytes(kept)
    assert command(f"resume={run.path}").code == 0


def test_a_name_or_a_value_that_was_damaged_is_refused_with_the_file(run):
    file = run / ".hydra" / "config.yaml"
    text = file.read_text()
    for sound, damaged in (
        ("max_retriever_error", "maX_retriever_error"),
        ("schedule: constant", "schedule: conwtant"),
        ("filters:", "fklters:"),
    ):
        assert sound in text
        file.write_text(text.replace(sound, damaged))
        again = command(f"resume={run}")
        assert again.code == 1
        assert damaged.split()[-1].rstrip(":") in again.err
        assert f"The settings are those in {file}; if it was changed, change it back." in again.err


def test_a_training_state_that_would_execute_something(run, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = run / "checkpoints" / f"{STEPS:06d}"
    torch.save({"learner": Runs(), "trainer": {}, "critic": None}, folder / TRAINING_STATE)
    (folder / MANIFEST).unlink()
    _write_manifest(folder, STEPS)  # as who can write the state can
    again = command(f"resume={run}")
    assert again.code == 1
    assert "Traceback" not in again.err
    assert f"{folder / TRAINING_STATE} can't be read without executing what is in it" in again.err
    assert f"begin a new run from the weights beside it: model.policy={folder}" in again.err
    assert not (tmp_path / "ran").exists()


def test_a_plug_in_that_is_not_there_any_more(run):
    file = run / ".hydra" / "config.yaml"
    file.write_text(file.read_text().replace("name: exact_match", "name: of_a_plug_in"))
    again = command(f"resume={run}")
    assert again.code == 1
    first, second = again.err.splitlines()
    assert first.startswith("UnknownNameError: Unknown reward 'of_a_plug_in'.")
    assert first.endswith(f"The settings are those in {file}; if it was changed, change it back.")
    # Resuming once more by itself would fail in the same way, so that is not what is advised.
    assert second == (
        "If a plug-in registers it, install its package, or name its file: AGENTIC_RAG_PLUGINS=<file> python -m "
        f"algorithms.run resume={run}"
    )


@pytest.mark.parametrize(("steps", "warmup", "warned"), [(1, 1, True), (1, 6, True), (2, 1, False)])
def test_a_run_in_which_only_the_critic_would_learn_says_so(run, tmp_path, cache, recwarn, steps, warmup, warned):
    settings = ["algo=ppo", *PPO, f"algo.steps={steps}", f"algo.critic_warmup_steps={warmup}", "model.teacher=null"]
    with patch.object(Trainer, "train", side_effect=KeyboardInterrupt):
        command(*TINY, *settings, f"hydra.run.dir={tmp_path / 'new'}", f"cache_dir={cache}")
    said = [str(warning.message) for warning in recwarn if "only the critic learns" in str(warning.message)]
    expected = (
        f"ppo will leave the policy as it is: in all of its {steps} steps only the critic learns "
        f"(critic_warmup_steps={warmup}). Set critic_warmup_steps lower, or steps higher."
    )
    assert said == [expected] * warned
