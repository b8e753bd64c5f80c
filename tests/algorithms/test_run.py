"""A run from the command line to its directory, in seconds: what it writes, what it repeats, and what it reuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import (
    DGPO,
    DGPO_STEPS,
    KD_STEPS,
    PPO,
    SFT,
    TINY,
    Run,
    assert_same_run,
    assert_same_training,
    command,
    resume,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_rag_env.types import Ending
from algorithms.assets import ASSETS
from algorithms.rollout.player import Player
from algorithms.rollout.trajectory_files import read_trajectories, transcript
from algorithms.training import demonstrations
from algorithms.training.build import Networks
from algorithms.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS = KD_STEPS + DGPO_STEPS
GREEDY = "evaluation.temperatures=[0]"


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, cache):
    """One stage without a teacher at hand, from the raw model."""
    path = tmp_path_factory.mktemp("runs") / "ppo"
    return train(path, cache, "algo=ppo", *PPO, "algo.steps=2", "model.teacher=null", GREEDY)


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_run_directory_holds_what_the_contract_says(dgpo_run):
    names = {entry.name for entry in dgpo_run.path.iterdir()}
    assert names == {"summary.json", "metrics.jsonl", "tb", "checkpoints", "trajectories", "predictions", ".hydra"}
    saved = OmegaConf.load(dgpo_run.path / ".hydra" / "config.yaml")
    assert saved.algo.name == "dgpo"
    assert saved.algo.steps == DGPO_STEPS
    assert saved.algo.warm_start.name == "kd"
    hydra = OmegaConf.load(dgpo_run.path / ".hydra" / "hydra.yaml").hydra
    assert f"hydra.run.dir={dgpo_run.path}" in hydra.overrides.hydra


def test_the_summary_says_what_was_done_and_what_came_of_it(dgpo_run):
    summary = dgpo_run.summary
    assert summary["algo"] == "dgpo"
    assert summary["seed"] == 0
    assert [(stage["name"], stage["steps"], stage["checkpoint"]) for stage in summary["stages"]] == [
        ("kd", KD_STEPS, f"checkpoints/{KD_STEPS:06d}"),
        ("dgpo", DGPO_STEPS, f"checkpoints/{STEPS:06d}"),
    ]
    assert list(summary["evaluation"]) == ["raw", "kd", "dgpo", "teacher"]
    for modes in summary["evaluation"].values():
        assert list(modes) == ["greedy", "T=1"]
        for groups in modes.values():
            assert groups.keys() == {"all", "single_hop", "multi_hop"}
            assert groups["all"]["n"] == 32 == groups["single_hop"]["n"] + groups["multi_hop"]["n"]
            for figures in groups.values():
                low, high = figures["exact_match_interval"]
                assert 0 <= low <= figures["exact_match"] <= high <= 1
    assert summary["evaluation"]["teacher"]["greedy"]["all"]["exact_match"] > 0.5
    gain = summary["gain"]["greedy"]
    assert gain["over"] == "kd"
    exact_match = {name: modes["greedy"]["all"]["exact_match"] for name, modes in summary["evaluation"].items()}
    assert gain["exact_match"] == pytest.approx(exact_match["dgpo"] - exact_match["kd"], abs=1e-12)
    assert summary["kl_estimator"] == "k1"
    assert summary["config"]["algo"]["warm_start"]["epochs"] == 2
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["peak_memory_mb"] > 100
    times = [name for name in summary["costs"] if name.endswith("_s")]
    assert {"rollout_s", "score_s", "update_s", "dev_s", "checkpoint_s", "evaluation_s"} <= set(times)
    assert all(summary["costs"][name] > 0 for name in times)


def test_the_best_checkpoint_of_every_stage_is_kept(dgpo_run):
    for stage in dgpo_run.summary["stages"]:
        checks = [row for row in dgpo_run.metrics if row["stage"] == stage["name"] and "dev/exact_match" in row]
        best = max(checks, key=lambda row: row["dev/exact_match"])  # the first of the best
        saved = {"checkpoint": f"checkpoints/{best['step']:06d}", "exact_match": best["dev/exact_match"]}
        assert stage["best_on_dev"] == saved
        assert (dgpo_run.path / saved["checkpoint"] / "model.safetensors").is_file()


def test_a_policy_that_collapses_leaves_its_best_checkpoint(tmp_path, cache):
    scores = iter([0.25, 0.5, 0.125])

    def check(trainer, logger, probes, steers):
        trainer.position.note_check(next(scores))
        return {}

    settings = ["algo=ppo", *PPO, "algo.steps=6", "model.teacher=null", GREEDY, "checkpoint_every=5"]
    with patch.object(Trainer, "_check_on_dev", check):
        run = train(tmp_path / "run", cache, *settings, "keep_checkpoints=1")
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["000004", "000006"]
    assert run.summary["stages"][0]["best_on_dev"] == {"checkpoint": "checkpoints/000004", "exact_match": 0.5}
    assert f"python -m algorithms.evaluate checkpoint={run.path}/checkpoints/000004" in run.out


def test_the_cost_of_the_teacher_is_counted(dgpo_run, ppo_run):
    costs, demonstrated = dgpo_run.summary["costs"], dgpo_run.summary["demonstrations"]["kd"]
    assert demonstrated["wanted"] == demonstrated["found"] == 24
    assert demonstrated["asked"] >= 24
    assert costs["episodes"] == 16 * DGPO_STEPS
    # `kd` reads the teacher's distribution of every demonstration once, `dgpo` its probabilities of wrong trajectories.
    assert 0 < costs["teacher_scored_tokens"] < costs["trained_tokens"]
    of_teacher = costs["teacher_sampled_tokens"] + costs["teacher_scored_tokens"]
    of_policy = costs["sampled_tokens"] + costs["trained_tokens"]
    assert dgpo_run.summary["teacher_share_of_training"] == pytest.approx(of_teacher / (of_teacher + of_policy))
    assert costs["teacher_sampled_tokens"] > 0
    assert ppo_run.summary["teacher_share_of_training"] == 0


def test_every_step_has_its_line_of_metrics(dgpo_run):
    assert [row["step"] for row in dgpo_run.metrics] == list(range(1, STEPS + 1))
    assert [row["stage"] for row in dgpo_run.metrics] == ["kd"] * KD_STEPS + ["dgpo"] * DGPO_STEPS
    for row in dgpo_run.metrics:
        warming_up = row["step"] == KD_STEPS + 1  # only the critic learns
        assert {"train/value_loss" if warming_up else "train/loss", "time/score_s", "time/update_s"} <= row.keys()
        assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in row.values())
        assert ("dev/exact_match" in row) == (row["step"] % 2 == 0)
    rollouts = [row for row in dgpo_run.metrics if row["stage"] == "dgpo"]
    for row in rollouts:
        assert {"rollout/exact_match", "rollout/retriever_errors", "time/rollout_s"} <= row.keys()
        assert row["step"] == KD_STEPS + 1 or {"train/approx_kl", "train/entropy"} <= row.keys()
        assert 0 <= row["rollout/exact_match"] <= 1
        assert row["rollout/retriever_errors"] == 0
        assert sum(row[f"rollout/{ending}_fraction"] for ending in Ending) == pytest.approx(1)
    assert not any("rollout/exact_match" in row for row in dgpo_run.metrics if row["stage"] == "kd")


def test_tensorboard_shows_scalars_transcripts_and_hyperparameters(dgpo_run):
    scalars = dgpo_run.scalars()
    for name in ("train/loss", "rollout/exact_match", "dev/exact_match", "time/rollout_s"):
        written = [(row["step"], row[name]) for row in dgpo_run.metrics if name in row]
        assert scalars[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]
    for mode, tag in (("greedy", ""), ("T=1", "/T=1")):
        for group, figures in dgpo_run.summary["evaluation"]["dgpo"][mode].items():
            assert scalars[f"eval/{group}/exact_match{tag}"] == [(STEPS, pytest.approx(figures["exact_match"]))]
    events = EventAccumulator(str(dgpo_run.path / "tb")).Reload()
    shown = events.Tensors("transcripts/dev/text_summary")
    assert [event.step for event in shown] == [2, 4, 6, 8, 10]
    assert shown[0].tensor_proto.string_val[0].decode().startswith("    ")
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"algo.warm_start.epochs" in settings
    assert b"eval/all/exact_match" in events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert [event.step for event in events.Tensors("run/command/text_summary")] == [0]


def test_checkpoints_are_hugging_face_models_and_the_last_one_is_what_was_trained(tmp_path, cache):
    kept = []

    def train_and_keep(trainer, original=Trainer.train):
        original(trainer)
        kept.append({name: value.clone() for name, value in trainer.networks.policy.state_dict().items()})

    with patch.object(Trainer, "train", train_and_keep):
        run = train(tmp_path / "run", cache, "algo=sft", *SFT, "algo.epochs=1", GREEDY, "evaluation.num_questions=4")
    folder = run.path / "checkpoints" / "000003"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert all(torch.equal(value, kept[0][name]) for name, value in model.state_dict().items())
    raw = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-student", dtype="float32").state_dict()
    assert not all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    text = "Who? <search> Ana works </search>"
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(ASSETS / "tiny-student")
    assert tokenizer(text).input_ids == original(text).input_ids


def test_trajectories_can_be_read_back(dgpo_run):
    folder = dgpo_run.path / "trajectories"
    tests = {f"test-{name}-{mode}.jsonl.gz" for name in ("raw", "kd", "dgpo", "teacher") for mode in ("greedy", "T=1")}
    on_the_way = {f"{split}-{step:06d}.jsonl.gz" for split in ("dev", "train") for step in (2, 4, 6, 8, 10)}
    assert {file.name for file in folder.iterdir()} == tests | on_the_way
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-teacher")
    trajectories = read_trajectories(folder / "test-teacher-greedy.jsonl.gz")
    assert len(trajectories) == 32
    figures = dgpo_run.summary["evaluation"]["teacher"]["greedy"]["all"]
    assert sum(trajectory.correct for trajectory in trajectories) / 32 == figures["exact_match"]
    assert all("</answer>" in transcript(each, tokenizer) for each in trajectories if each.terminated)


def test_what_is_printed_is_for_people(dgpo_run):
    assert dgpo_run.err == ""
    for expected in ("training: kd (6 steps), then dgpo (4 steps)", f"run directory: {dgpo_run.path}", "<answer>"):
        assert expected in dgpo_run.out
    for noise in ("Loading weights", "DEBUG", "Warning", "\r", "\x1b"):
        assert noise not in dgpo_run.out
    assert "training: kd (6 steps), then dgpo (4 steps)" in dgpo_run.out


# --- the teacher is absent -------------------------------------------------------------------------------------------


def test_the_teacher_is_absent_when_the_policy_is_measured(dgpo_run):
    assert dgpo_run.summary["teacher_in_memory_during_policy_evaluation"] is False


def test_a_teacher_that_somebody_still_holds_is_noticed(tmp_path, cache):
    held = []

    def load_and_hold(networks, original=Networks.teacher):
        held.append(original(networks))
        return held[0]

    with patch.object(Networks, "teacher", load_and_hold):
        settings = [*DGPO, "algo.steps=1", "algo.warm_start.epochs=1", GREEDY, "evaluation.num_questions=2"]
        run = train(tmp_path / "run", cache, *settings)
    assert held
    assert run.summary["teacher_in_memory_during_policy_evaluation"] is True


# --- compositions ----------------------------------------------------------------------------------------------------


def test_one_stage_from_the_raw_model(ppo_run):
    assert [stage["name"] for stage in ppo_run.summary["stages"]] == ["ppo"]
    assert list(ppo_run.summary["evaluation"]) == ["raw", "ppo"]
    assert ppo_run.summary["gain"]["greedy"]["over"] == "raw"
    assert ppo_run.summary["demonstrations"] == {}
    assert ppo_run.summary["teacher_in_memory_during_policy_evaluation"] is False


def test_a_run_in_bfloat16_says_so_and_how_far_its_rollouts_are_from_training(ppo_run, tmp_path, cache, recwarn):
    settings = ["algo=ppo", *PPO, "algo.steps=2", "algo.critic_warmup_steps=0", GREEDY, "evaluation.num_questions=4"]
    run = train(tmp_path / "run", cache, *settings, "learner.precision=bfloat16")
    assert "computing in bfloat16 (learner.precision=bfloat16) on cpu, attention by flash\n" in run.out
    assert run.summary["attention"] == dict.fromkeys(("training", "prefill", "decode"), "flash")
    assert (run.summary["precision"], run.summary["precision_reason"]) == ("bfloat16", "learner.precision=bfloat16")
    gaps = [row["rollout/logprob_gap_mean"] for row in run.metrics]
    assert all(1e-4 < mean < row["rollout/logprob_gap_max"] for mean, row in zip(gaps, run.metrics, strict=True))
    told = [str(one.message) for one in recwarn if "differ from those of the training pass" in str(one.message)]
    assert len(told) == (max(gaps) > 5e-3), "once for both steps"
    # In float32 both passes agree.
    measured = [row["rollout/logprob_gap_max"] for row in ppo_run.metrics if "rollout/logprob_gap_max" in row]
    assert measured
    assert max(measured) < 1e-4


def test_dgpo_without_a_cold_start(tmp_path, cache):
    settings = ["algo=dgpo", *PPO, "algo.warm_start=null", "algo.steps=1", GREEDY, "evaluation.num_questions=4"]
    run = train(tmp_path / "run", cache, *settings)
    assert [stage["name"] for stage in run.summary["stages"]] == ["dgpo"]
    assert list(run.summary["evaluation"]) == ["raw", "dgpo", "teacher"]


@pytest.mark.parametrize(("algo", "reads_teacher"), [("kd", True), ("sft", False)])
def test_a_cold_start_alone(tmp_path, cache, algo, reads_teacher):
    settings = [f"algo={algo}", *SFT, "algo.epochs=1", GREEDY, "evaluation.num_questions=4"]
    run = train(tmp_path / "run", cache, *settings)
    assert [stage["name"] for stage in run.summary["stages"]] == [algo]
    assert ("teacher_scored_tokens" in run.summary["costs"]) == reads_teacher


def test_the_threshold_hands_over_early_and_exactly_there(tmp_path, cache):
    settings = [*DGPO, "algo.steps=1", GREEDY, "evaluation.num_questions=4"]
    settings += ["algo.warm_start.hand_over_exact_match=0.5"]
    scores = iter([0.25, 0.5, 1.0, 1.0])

    def check(trainer, logger, probes, steers):
        trainer.position.dev_exact_match = next(scores)
        return {"dev/exact_match": trainer.position.dev_exact_match}

    with patch.object(Trainer, "_check_on_dev", check):
        run = train(tmp_path / "run", cache, *settings)
    assert [(stage["name"], stage["steps"]) for stage in run.summary["stages"]] == [("kd", 4), ("dgpo", 1)]
    assert (run.path / "checkpoints" / "000004").is_dir()


# --- repeating -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def untouched(dgpo_run, tmp_path_factory):
    """A copy of the finished run that a test may go on with."""
    return Path(shutil.copytree(dgpo_run.path, tmp_path_factory.mktemp("copies") / "dgpo"))


def test_the_same_seed_repeats_the_run_with_a_teacher_asked_anew(dgpo_run, tmp_path):
    again = train(tmp_path / "again", tmp_path / "another cache", *DGPO)
    assert_same_run(dgpo_run, again)
    assert not list((tmp_path / "another cache").rglob("*.parts"))


def test_another_seed_is_another_run(dgpo_run, tmp_path, cache):
    settings = [*DGPO, "seed=1", "algo.steps=1", GREEDY, "evaluation.num_questions=2"]
    other = train(tmp_path / "other", cache, *settings)
    for step, name in ((0, "train/loss"), (KD_STEPS, "train/value_loss")):
        mine, theirs = dgpo_run.metrics[step], other.metrics[step]
        assert mine[name] != theirs[name]
    mine, theirs = dgpo_run.weights(KD_STEPS), other.weights(KD_STEPS)
    assert not any(torch.equal(mine[name], theirs[name]) for name in mine if "norm" not in name)


def test_a_finished_run_that_is_resumed_is_measured_again_and_not_trained(dgpo_run, untouched):
    with patch.object(Trainer, "_train_step", side_effect=AssertionError("trained")):
        again = resume(untouched)
    assert f"resuming after step {STEPS} of {STEPS}" in again.out
    assert_same_run(dgpo_run, again)


def test_what_says_only_how_a_run_is_carried_out_may_differ_on_resuming(dgpo_run, tmp_path):
    """Interrupted after the checkpoint before the last; from there on every checkpoint is kept."""
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    checkpoints = path / "checkpoints"
    shutil.rmtree(checkpoints / f"{STEPS:06d}")
    (path / "summary.json").unlink()
    kept = {path.name for path in checkpoints.iterdir()}
    refused = command(f"resume={path}", "threads=1", "num_envs=8")
    assert refused.code == 1
    assert "where num_envs is 16, not 8. Leave it out" in refused.err
    again = command(f"resume={path}", "threads=1", "checkpoint_every=1", "keep_checkpoints=null")
    assert again.code == 0, again.err
    assert_same_training(dgpo_run, Run(path))
    steps = range(int(max(kept)) + 1, STEPS + 1)
    assert {path.name for path in checkpoints.iterdir()} == kept | {f"{step:06d}" for step in steps}


def test_a_process_of_its_own_started_elsewhere_gives_the_same_run(dgpo_run, tmp_path, cache):
    run_dir = tmp_path / "run"
    settings = ["algo=sft", *SFT, "algo.epochs=1", GREEDY, "evaluation.num_questions=4"]
    call = [sys.executable, "-m", "algorithms.run", *TINY, *settings, f"hydra.run.dir={run_dir}", f"cache_dir={cache}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        call, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    here = train(tmp_path / "here", cache, *settings)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["evaluation"] == here.summary["evaluation"]
    assert_same_training(here, type(here)(run_dir))


# --- demonstrations --------------------------------------------------------------------------------------------------


def test_demonstrations_are_collected_once(dgpo_run, tmp_path, cache):
    settings = ["algo=sft", "algo.batch_size=8", "algo.num_demonstrations=24", "algo.epochs=1", GREEDY]
    loaded = []

    def load(networks, original=Networks.teacher):
        loaded.append("teacher")
        return original(networks)

    stop = patch.object(Trainer, "train", side_effect=KeyboardInterrupt)
    collect = patch.object(demonstrations, "collect", side_effect=AssertionError)
    with stop, collect, patch.object(Networks, "teacher", load):
        run = command(*TINY, *settings, f"hydra.run.dir={tmp_path}", f"cache_dir={cache}")
    assert run.code == 130, run.err
    assert loaded == []


@pytest.mark.parametrize(
    "change",
    [
        "seed=2",
        "dataset.seed=1",
        "dataset.num_questions=50",
        "dataset.num_passages=160",
        "retriever.k1=1.5",
        "env.top_k=2",
        "rollout.temperature=0.5",
        "algo.num_demonstrations=23",
        "algo.correct_only=false",
        "model.teacher=TEACHER",
        "model.teacher=TEMPLATE",
        "learner.precision=bfloat16",
    ],
)
def test_whatever_decides_the_demonstrations_is_in_their_key(change, dgpo_run, tmp_path, cache):
    if "TEACHER" in change:
        teacher = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-teacher")
        with torch.no_grad():
            teacher.get_output_embeddings().weight[0, 0] += 1e-3
        teacher.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(ASSETS / "tiny-teacher").save_pretrained(tmp_path / "model")
    if "TEMPLATE" in change:  # the teacher's tokenizer writes the prompt that it reads
        with_template("tiny-teacher", tmp_path / "model")
    change = change.replace("TEACHER", str(tmp_path / "model")).replace("TEMPLATE", str(tmp_path / "model"))
    asked = patch.object(demonstrations, "collect", side_effect=KeyboardInterrupt)
    with asked as collect:
        run = command(*TINY, "algo=sft", *SFT, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}", change)
    assert run.code == 130, run.err
    assert collect.called


def with_template(model: str, folder: Path) -> None:
    """A copy of a bundled model with a chat template of its own."""
    shutil.copytree(ASSETS / model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'] }}!"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_how_the_policy_reads_prompts_asks_no_teacher_anew(dgpo_run, tmp_path, cache):
    with_template("tiny-student", tmp_path / "model")
    settings = ["algo=sft", *SFT, "algo.epochs=1", f"model.policy={tmp_path / 'model'}", GREEDY]
    with patch.object(demonstrations, "collect", side_effect=AssertionError("asked")):
        run = train(tmp_path / "run", cache, *settings, "evaluation.num_questions=2", "probes=[]")
    assert run.summary["demonstrations"]["sft"]["found"] == 24
    (first, *_) = read_trajectories(run.path / "trajectories" / "train-000002.jsonl.gz")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode(first.prompt_ids.tolist()).endswith("\n!")


def test_demonstrations_are_those_of_what_is_searched_now(dgpo_run, tmp_path, cache):
    """The same address, and another index behind it."""
    with (
        patch("algorithms.training.batches.of_retriever", return_value="another index"),
        patch.object(demonstrations, "collect", side_effect=KeyboardInterrupt) as collect,
    ):
        command(*TINY, "algo=sft", *SFT, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}")
    assert collect.called


def test_a_single_set_of_questions_stands_in_tensorboard_by_its_name(tmp_path):
    files = {"questions": tmp_path / "riddles.jsonl", "corpus": tmp_path / "corpus.jsonl"}
    riddles = [{"id": f"q{number}", "question": f"Who is {number}?", "golden_answers": ["Ada"]} for number in range(30)]
    files["questions"].write_text("".join(json.dumps(riddle) + "\n" for riddle in riddles))
    files["corpus"].write_text('{"id": "p", "contents": "Ada\\nAda it is."}\n')
    settings = [each for each in TINY if not each.startswith("dataset.")]
    settings += ["dataset=jsonl", *(f"dataset.{name}={path}" for name, path in files.items()), "model.teacher=null"]
    run = command(
        *settings, "algo=ppo", *PPO, "algo.steps=1", GREEDY, f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/c"
    )
    assert run.code == 0, run.err
    shown = Run(tmp_path / "run").scalars()
    assert shown["eval/riddles/exact_match"] == shown["eval/all/exact_match"]


def test_interrupting_a_run_says_how_to_go_on(tmp_path, cache):
    rollout, calls = Player.rollout, []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 4:  # a step, another one with its check, and the third step
            raise KeyboardInterrupt
        return rollout(*args, **settings)

    with patch.object(Player, "rollout", interrupted):
        run = command(*TINY, "algo=ppo", *PPO, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}")
    assert run.code == 130
    going_on = f"Checkpoints are kept. To go on: python -m algorithms.run resume={tmp_path / 'run'}"
    assert run.err.splitlines() == ["Interrupted.", going_on]


@pytest.mark.parametrize(
    "sizes",
    [
        [
            "algo.batch_size=4",
            "algo.num_minibatches=3",
            "algo.num_demonstrations=7",
        ],  # three minibatches of 4, then of 3
        ["algo.batch_size=50", "algo.num_minibatches=7", "algo.num_demonstrations=9"],  # a batch smaller than wanted
    ],
)
def test_sizes_that_do_not_divide_train_all_the_same(tmp_path, cache, sizes):
    settings = ["algo=sft", *sizes, "algo.epochs=2", GREEDY, "evaluation.num_questions=2"]
    run = train(tmp_path / "run", cache, *settings)
    losses = [row["train/loss"] for row in run.metrics]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_a_cache_tells_its_hit_rate_and_a_run_can_be_replayed_from_it(tmp_path, cache):
    start = ("algo.warm_start.batch_size=8", "algo.warm_start.num_demonstrations=24", "algo.warm_start.epochs=2")
    settings = ["algo=sft_ppo", *PPO, "algo.steps=2", *start, "retriever=cached", "retriever.retriever=bm25"]
    settings.append(f"retriever.path={tmp_path / 'searches.sqlite'}")
    first = train(tmp_path / "first", cache, *settings)
    assert all(0 <= row["rollout/cache_hit_rate"] < 1 for row in first.metrics if "rollout/exact_match" in row)
    replayed = train(tmp_path / "replayed", cache, *settings, "retriever.offline=true")
    rates = [row.pop("rollout/cache_hit_rate") for row in replayed.metrics_without_times() if "rollout/reward" in row]
    assert rates == [1.0, 1.0]
    for row in (*first.metrics, *replayed.metrics):
        row.pop("rollout/cache_hit_rate", None)
    assert first.metrics_without_times() == replayed.metrics_without_times()
