"""What a user may get wrong: a message of a line or two, exit code 1, and everything that was done is kept."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import DGPO, KD_STEPS, PPO, SFT, TINY, Run, assert_same_run, command, resume

import algorithms.run
from agentic_rag_env.errors import ConfigurationError
from algorithms.assets import ASSETS
from algorithms.learner.training_step import Learner
from algorithms.training import checkpoint, evaluation
from algorithms.training.trainer import Trainer

QUESTION = {"id": "q", "question": "Who?", "golden_answers": ["Ana"]}
PASSAGE = {"id": "p", "contents": "Ana\nAna is."}


@pytest.fixture
def fail(tmp_path, cache):
    """Runs the command into `tmp_path / "run"` and returns what it complained about, in one paragraph."""

    def call(*overrides: str) -> str:
        small = [each for each in TINY if not ("dataset=jsonl" in overrides and each.startswith("dataset."))]
        run = command(*small, *overrides, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}")
        assert run.code == 1
        assert "Traceback" not in run.err
        assert 1 <= run.err.count("\n") <= 3, run.err
        return run.err

    return call


@pytest.fixture
def lines(tmp_path):
    """Writes JSON lines and returns the path."""

    def write(name: str, *rows: dict | str) -> Path:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def student(tmp_path):
    """A copy of the bundled student, to be damaged."""
    return Path(shutil.copytree(ASSETS / "tiny-student", tmp_path / "student"))


def real_text(questions: Path, corpus: Path) -> list[str]:
    """Overrides for questions and passages of one's own."""
    return ["dataset=jsonl", f"dataset.questions={questions}", f"dataset.corpus={corpus}"]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([QUESTION, '{"question": '], "line 2: invalid JSON"),
        ([QUESTION, {"id": "r", "golden_answers": ["x"]}], "line 2: no field 'question'"),
        ([QUESTION, {**QUESTION, "id": "r", "golden_answers": []}], "line 2, field 'golden_answers'"),
        ([QUESTION, {"id": "r", "question": "Who?"}], "line 2: no field 'golden_answers'"),
        ([QUESTION, QUESTION], "line 2: id 'q' is already the id of line 1"),
        ([], "is empty; a dataset needs at least one question"),
        ([QUESTION], "the file has too few questions to be divided"),
    ],
)
def test_a_file_of_questions_that_is_no_such_file(fail, lines, rows, expected):
    questions = lines("questions.jsonl", *rows)
    message = fail(*real_text(questions, lines("corpus.jsonl", PASSAGE)))
    assert str(questions) in message
    assert expected in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([PASSAGE, "[]"], "line 2: expected a JSON object, got list"),
        ([PASSAGE, {"id": "r", "text": "x"}], "line 2: no field 'title'"),
        ([], "is empty; a corpus needs at least one passage"),
    ],
)
def test_a_corpus_that_is_none(fail, lines, rows, expected):
    questions = lines("questions.jsonl", *[{**QUESTION, "id": str(number)} for number in range(60)])
    corpus = lines("corpus.jsonl", *rows)
    message = fail(*real_text(questions, corpus))
    assert str(corpus) in message
    assert expected in message


def test_missing_files(fail, lines, tmp_path):
    corpus, nowhere = lines("corpus.jsonl", PASSAGE), tmp_path / "nowhere.jsonl"
    assert f"{nowhere}: cannot be read: No such file" in fail(*real_text(nowhere, corpus))
    questions = lines("questions.jsonl", *[{**QUESTION, "id": str(number)} for number in range(60)])
    assert f"{nowhere}: cannot be read: No such file" in fail(*real_text(questions, nowhere))
    assert "retriever 'bm25' searches a corpus, but got none" in fail(*real_text(questions, "null"))


def test_a_retriever_that_nobody_answers(fail):
    message = fail(
        "algo=ppo", *PPO, "retriever=http", "retriever.url=http://127.0.0.1:9/retrieve",
        "retriever.max_retries=0", "retriever.timeout_s=1",
        "model.policy=tiny-teacher",  # which searches at once
    )  # fmt: skip
    assert message.startswith("RetrieverError: ")
    assert "max_retriever_error_fraction=0.2" in message
    assert "http://127.0.0.1:9/retrieve" in message


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(fail, student):
    for file in student.glob("tokenizer*"):
        file.unlink()
    message = fail(f"model.policy={student}")
    assert message.startswith(f"ConfigurationError: '{student}' holds no tokenizer: none of tokenizer.json")


def test_a_folder_without_weights(fail, student):
    (student / "model.safetensors").unlink()
    message = fail(f"model.policy={student}")
    assert f"Cannot load '{student}'" in message
    assert "model.safetensors" in message


def test_weights_that_were_cut_off(fail, student):
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"Cannot load '{student}'" in fail(f"model.policy={student}")


def test_weights_of_another_shape(fail, student):
    tensors = load_file(student / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name][:-8].contiguous()}, student / "model.safetensors", {"format": "pt"})
    message = fail(f"model.policy={student}")
    assert f"The weights in '{student}' do not fit its config.json: 1 of them are missing" in message
    assert name in message


def test_weights_that_lack_a_layer(fail, student):
    tensors = load_file(student / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp" not in name}
    save_file(kept, student / "model.safetensors", {"format": "pt"})
    message = fail(f"model.policy={student}")
    assert (
        "3 of them are missing, have another shape or have no place, among them model.layers.0.mlp.down_proj.weight"
        in message
    )


def test_a_configuration_that_is_no_json(fail, student):
    (student / "config.json").write_text("{")
    assert f"Cannot load '{student}'" in fail(f"model.policy={student}")


def test_folders_and_names_that_are_no_model(fail, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer" in fail(f"model.policy={tmp_path / 'empty'}")
    assert "nothing/here" in fail(f"model.policy={tmp_path / 'nothing/here'}")
    assert "no bundled model 'tiny-studnet'. Did you mean 'tiny-student'?" in fail("model.policy=tiny-studnet")
    assert "no bundled model 'tiny-techer'. Did you mean 'tiny-teacher'?" in fail("model.teacher=tiny-techer")


@pytest.mark.parametrize("algo", ["dgpo", "kd"])
def test_no_teacher_where_one_is_needed(fail, algo):
    message = fail(f"algo={algo}", "model.teacher=null")
    assert "teacher" in message
    assert "model.teacher is null" in message


def test_a_teacher_that_speaks_another_language(fail, student):
    saved = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = saved["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (student / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    message = fail(f"model.teacher={student}", "algo=ppo")
    assert "The two tokenizers" in message
    assert f"differ from id {min(vocab[first], vocab[second])} on" in message


# --- settings that only show at work ---------------------------------------------------------------------------------


def test_a_context_that_is_too_short_is_noticed_before_any_training(fail):
    with patch.object(Trainer, "train", side_effect=AssertionError):
        message = fail("rollout.max_tokens=1000000")
    assert "max_tokens is 1000000, but the model's max_position_embeddings is" in message


@pytest.mark.parametrize("setting", ["top_p=0.9", "top_k=20"])
def test_policy_gradients_from_a_part_of_the_distribution(fail, setting):
    with patch.object(Trainer, "train", side_effect=AssertionError):
        message = fail("algo=ppo", f"rollout.{setting}")
    assert f"rollout.{setting}" in message
    assert "ppo estimates gradients of the policy's full distribution" in message
    assert "set rollout.top_p=1 and rollout.top_k=0" in message


def test_a_hand_over_that_nobody_would_look_for(fail):
    message = fail(*DGPO, "algo.warm_start.hand_over_exact_match=0.5", "evaluation.every=0")
    assert "hand_over_exact_match of kd" in message
    assert "evaluation.every=0" in message


def test_a_last_batch_that_is_too_small_for_its_minibatches(fail):
    sizes = ["algo.batch_size=8", "algo.num_minibatches=4", "algo.num_demonstrations=9"]
    with patch.object(Trainer, "train", side_effect=AssertionError):
        message = fail("algo=sft", *sizes)
    assert "sft: 9 demonstrations in batches of 8 leave 1 for the last batch" in message


def test_a_loss_that_is_not_finite(fail):
    update, calls = Learner.update, []

    def explode(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise FloatingPointError("Training step 4: the loss of the policy is nan.")
        return update(*args, **options)

    with patch.object(Learner, "update", explode):
        message = fail("algo=sft", *SFT)
    assert message.strip() == "FloatingPointError: Training step 4: the loss of the policy is nan.", "no way to go on"


# --- run directories -------------------------------------------------------------------------------------------------


def test_resuming_what_is_no_run_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder", "nowhere"):
        run = command(f"resume={name}")
        assert run.code == 1
        assert run.err.startswith(
            f"ConfigurationError: {name} is no run directory: {name}/.hydra/config.yaml is missing."
        )
        assert run.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_run_is_not_overwritten_by_another_one(dgpo_run):
    before = {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()}
    run = command("algo=sft", f"hydra.run.dir={dgpo_run.path}")
    assert run.code == 1
    assert run.err.startswith(
        f"ConfigurationError: {dgpo_run.path} holds a run. Go on with it by resume={dgpo_run.path}"
    )
    assert {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()} == before


def test_the_advice_for_a_run_holds_where_its_path_has_a_blank(tmp_path):
    run_dir = tmp_path / "my run"
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (run_dir / "metrics.jsonl").touch()
    assert f"Go on with it by resume='{run_dir}', or" in command("algo=sft", f"hydra.run.dir={run_dir}").err
    assert f"model.policy='{run_dir}'/checkpoints/<step>." in command(f"resume={run_dir}", "seed=1").err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "seed is 0, not 1"),
        ("algo=sft", "algo is dgpo, not sft"),
        ("algo.steps=5", "algo.steps is 4, not 5"),
        ("algo@algo.warm_start=sft", "algo.warm_start is kd, not sft"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(dgpo_run, override, expected):
    before = {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()}
    run = command(f"resume={dgpo_run.path}", override)
    assert run.code == 1
    assert f"where {expected}." in run.err
    assert {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()} == before


def test_settings_may_be_repeated_when_a_run_goes_on(dgpo_run):
    with patch.object(algorithms.run, "run", side_effect=lambda config, run_dir: calls.append((config, run_dir))):
        calls: list = []
        run = command(f"resume={dgpo_run.path}", "algo=dgpo", "algo.steps=4", "algo.warm_start.epochs=2", "seed=0")
    assert run.code == 0, run.err
    ((config, run_dir),) = calls
    assert run_dir == dgpo_run.path
    assert config.algo["batch_size"] == 16
    assert config.algo["warm_start"]["num_demonstrations"] == 24


def test_a_configuration_that_was_cut_off(dgpo_run, tmp_path):
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    saved = path / ".hydra" / "config.yaml"
    saved.write_text(saved.read_text().partition("\nnum_envs:")[0] + "\n")
    run = command(f"resume={path}")
    assert run.code == 1
    assert "The configuration lacks num_envs, " in run.err
    assert "Traceback" not in run.err


# --- the disk --------------------------------------------------------------------------------------------------------


def no_space(*args, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_a_checkpoint_is_saved_costs_that_checkpoint_only(dgpo_run, fail, tmp_path):
    save, calls = torch.save, []

    def fill_up(*args, **settings):
        calls.append(1)
        return save(*args, **settings) if len(calls) < 3 else no_space()

    with patch.object(checkpoint.torch, "save", fill_up):
        message = fail(*DGPO)
    assert "No space left to save checkpoint" in message
    assert str(tmp_path / "run" / "checkpoints" / "000004") in message  # the latest that is there
    assert f"python -m algorithms.run resume={tmp_path / 'run'}" in message
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["000002", "000004"]
    again = resume(tmp_path / "run")
    assert f"resuming after step 4 of {KD_STEPS + 4}" in again.out
    assert_same_run(dgpo_run, again)


def test_a_disk_that_fills_up_during_the_evaluation_costs_no_training(dgpo_run, tmp_path):
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    (path / "summary.json").unlink()
    with patch.object(evaluation, "write_trajectories", no_space):
        run = command(f"resume={path}")
    assert run.code == 1
    assert run.err.splitlines()[0] == "OSError: [Errno 28] No space left on device"
    assert_same_run(dgpo_run, resume(path))


def test_a_cache_that_cannot_be_written(tmp_path, lines):
    blocked = lines("a file", "x") / "cache"
    run = command(*TINY, "algo=sft", *SFT, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={blocked}")
    assert run.code == 1
    assert run.err.count("\n") == 1
    assert str(blocked) in run.err


def test_damaged_demonstrations_are_collected_again(dgpo_run, tmp_path, cache):
    damaged = Path(shutil.copytree(cache, tmp_path / "cache"))
    for file in (damaged / "demonstrations").glob("*.jsonl.gz"):
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"jsonl\.gz is made again: it does not have the checksum"):
        run = command(*TINY, *DGPO, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={damaged}")
    assert run.code == 0, run.err
    assert_same_run(dgpo_run, Run(tmp_path / "run"))


# --- bugs, and many jobs ---------------------------------------------------------------------------------------------


def test_a_bug_shows_where_it_is(tmp_path):
    with patch.object(algorithms.run, "run", side_effect=ZeroDivisionError("a bug")):
        run = command(f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "Traceback (most recent call last)" in run.err
    assert run.err.count("carry_out(run, settings") == 1
    assert "ZeroDivisionError: a bug" in run.err


def test_the_place_of_any_error_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigurationError, match="steps must be above 0"):
        command("algo.steps=-1", f"hydra.run.dir={tmp_path / 'run'}")


def test_a_cache_that_others_alone_may_write_to_is_refused_at_the_start(fail, cache):
    denied = PermissionError(errno.EACCES, "Permission denied")
    with patch("algorithms.training.file_locks.tempfile.TemporaryFile", side_effect=denied):
        message = fail("algo=ppo", *PPO)
    assert f"cache_dir={cache} can't be written to (Permission denied); name another folder." in message


def test_in_a_multirun_the_jobs_after_a_failed_one_still_run(tmp_path):
    seeds = []

    def run_one(config, run_dir):
        seeds.append(config.seed)
        if config.seed == 0:
            raise ConfigurationError("seed 0 brings no luck.")
        (run_dir / "metrics.jsonl").touch()
        (run_dir / "summary.json").write_text("{}")

    with patch.object(algorithms.run, "run", run_one):
        sweep = ("-m", "seed=0,1", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
        run = command(*sweep)
        assert run.code == 1
        assert "ConfigurationError: seed 0 brings no luck." in run.err
        assert "Traceback" not in run.err
        assert seeds == [0, 1]
        again = command(*sweep)
        assert again.code == 1
        assert seeds == [0, 1, 0]  # what is complete is left alone, whichever launcher
        other = command(*sweep, "num_envs=7", "hydra.sweep.subdir=seed-1")
    assert other.code == 1
    assert "seed-1 holds a run with other settings" in other.err
    assert "num_envs is 96 there, 7 here" in other.err
    assert seeds == [0, 1, 0]
