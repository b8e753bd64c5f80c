"""The controller from the command line to its tables: what it writes, learns and repeats, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from small_runs import Run, command
from transformers import AutoTokenizer

from agentic_rag_env import AgenticRAGEnv, AgenticRAGVectorEnv, ConfigurationError, RetrieverError
from agentic_rag_env.types import Ending, StepInfo, blank_info
from agentic_rag_env.wrappers import DiscreteActions
from algorithms import evaluate
from algorithms.analysis.runs import find_runs
from algorithms.assets import ASSETS
from algorithms.maskable_ppo import MaskablePPO, MaskablePPOConfig
from algorithms.rollout.trajectory_files import read_trajectories, transcript
from algorithms.sb3.episodes import Sample, pick, single
from algorithms.sb3.run import OutsideRun, check_failures
from algorithms.training.build import build_stages
from algorithms.training.trajectory_samples import NUM_SAVED

pytest.importorskip("sb3_contrib")

SMALL = [
    "algo=maskable_ppo", "threads=1", "dataset.num_passages=300", "dataset.num_questions=60", "env.max_turns=2",
    "algo.total_env_steps=100", "algo.turns_per_update=16", "num_envs=4", "algo.batch_size=32",
    "algo.hidden_size=16", "algo.max_candidates=6",
    "evaluation.num_questions=12", "evaluation.every=2", "evaluation.num_dev_questions=5",
]  # fmt: skip
DATASET = {"name": "tiny", "num_passages": 300, "num_questions": 60}


def train(path: Path, *overrides: str) -> Run:
    run = command(*SMALL, *overrides, f"hydra.run.dir={path}")
    assert run.code == 0, run.err
    return Run(path, run.code, run.out, run.err)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return train(tmp_path_factory.mktemp("runs") / "controller")


def test_a_run_directory_holds_what_that_of_any_run_holds(run):
    names = {entry.name for entry in run.path.iterdir()}
    parts = {"summary.json", "metrics.jsonl", "tb", "checkpoints", "trajectories", "predictions", ".hydra"}
    assert names == parts
    assert {file.name for file in (run.path / "predictions").iterdir()} == {
        "test-maskable_ppo-greedy.jsonl",
        "test-maskable_ppo-T=1.jsonl",
    }
    assert {file.name for file in (run.path / "trajectories").iterdir()} == {
        "train-000002.jsonl.gz",
        "dev-000002.jsonl.gz",
        "test-maskable_ppo-greedy.jsonl.gz",
        "test-maskable_ppo-T=1.jsonl.gz",
    }
    for shown in ("training: maskable_ppo (2 updates)", "exact match on 12 questions", f"run directory: {run.path}"):
        assert shown in run.out


def test_that_adapters_have_no_effect_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"trains no language model, so model.lora.rank=4 has no effect\."):
        train(tmp_path / "run", "model.lora.rank=4")


def test_the_summary_has_the_shape_of_every_summary(run):
    summary = run.summary
    assert summary["algo"] == "maskable_ppo"
    assert summary["stages"] == [{"name": "maskable_ppo", "steps": 2, "checkpoint": "checkpoints/000002"}]
    assert summary["evaluation"]["maskable_ppo"].keys() == {"greedy", "T=1"}
    for figures in summary["evaluation"]["maskable_ppo"].values():
        assert figures["all"]["n"] == 12
        assert figures["all"]["malformed_fraction"] == 0
        assert figures["all"]["answered_fraction"] == 1
    assert summary["costs"]["env_steps"] == 128
    assert 128 / 3 - 4 <= summary["costs"]["episodes"] <= 128
    times = {"rollout_s", "update_s", "dev_s", "checkpoint_s", "evaluation_s"}
    assert all(summary["costs"][name] > 0 for name in times)
    assert summary["teacher_share_of_training"] == 0
    assert summary["config"]["algo"]["hidden_size"] == 16
    (found,) = find_runs([run.path])
    assert (found.missing, found.name, found.final, found.modes) == (
        None, "maskable_ppo", "maskable_ppo", ["greedy", "T=1"],
    )  # fmt: skip
    assert len(found.outcomes["greedy"]) == 12


def test_every_update_has_its_line_of_metrics(run):
    assert [(row["step"], row["stage"]) for row in run.metrics] == [(1, "maskable_ppo"), (2, "maskable_ppo")]
    names = {"rollout/exact_match", "rollout/num_searches", "rollout/retriever_errors", "train/loss", "train/entropy"}
    for row in run.metrics:
        assert {*names, "train/approx_kl", "train/value_loss", "time/rollout_s", "time/update_s"} <= row.keys()
    assert [("dev/exact_match" in row) for row in run.metrics] == [False, True]
    assert [row["cost/env_steps"] for row in run.metrics] == [64, 128]
    assert run.metrics[-1]["cost/episodes"] == run.summary["costs"]["episodes"]
    scalars = run.scalars()
    assert [step for step, _ in scalars["train/loss"]] == [1, 2]
    expected = run.summary["evaluation"]["maskable_ppo"]["greedy"]["all"]["exact_match"]
    assert scalars["eval/all/exact_match"] == [(2, pytest.approx(expected))]


def test_transcripts_can_be_read_like_those_of_a_language_model(run):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-student")
    played = read_trajectories(run.path / "trajectories" / "test-maskable_ppo-T=1.jsonl.gz")
    assert len(played) == 12
    for trajectory in played:
        last = trajectory.turns[-1]
        assert last.info["action"] == "answer"
        assert trajectory.ending is Ending.ANSWERED
        assert f"<answer> {last.info['answer']} </answer>" in transcript(trajectory, tokenizer)
        assert all(turn.action_logprobs[0] < 0 and not turn.action_logprobs[1:].any() for turn in trajectory.turns)


def test_some_episodes_of_training_are_kept_as_they_were_played(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-student")
    rows = [json.loads(line) for line in run.transcripts()["train-000002.jsonl.gz"].splitlines()]
    kept = read_trajectories(run.path / "trajectories" / "train-000002.jsonl.gz")
    assert 1 <= len(kept) <= NUM_SAVED
    asked = {question.id: question for question in AgenticRAGEnv(dataset=DATASET | {"split": "train"}).dataset}
    for row, trajectory in zip(rows, kept, strict=True):
        question = asked[row["question_id"]]
        assert row["question"]["text"] == question.text
        told = transcript(trajectory, tokenizer)
        assert question.text in told
        assert trajectory.turns[-1].info["action"] == "answer"
        assert trajectory.correct == (trajectory.reward == 1)
        assert set(trajectory.turns[0].info) == set(StepInfo.__annotations__)  # nothing of the library's own
        for turn in trajectory.turns:
            assert f"> {turn.info['query'] or turn.info['answer']} </" in told
            assert turn.action_logprobs[0] < 0
    dev = read_trajectories(run.path / "trajectories" / "dev-000002.jsonl.gz")
    assert [each.correct for each in dev].count(True) / 5 == pytest.approx(run.metrics[-1]["dev/exact_match"])
    unwatched = train(tmp_path / "unwatched", "evaluation.every=0")
    assert unwatched.metrics[-1]["train/loss"] == run.metrics[-1]["train/loss"], "watching changes nothing"


def test_an_episode_that_ends_after_its_update_is_left_out():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-student")
    sample = Sample(2, tokenizer, lambda: True)  # every update is wanted, as with evaluation.every=1

    def end(record, reward: float) -> None:
        record.add("<answer> Oslo </answer>", -1.0, "", reward, True, False, blank_info("q", 1))
        sample.keep(record)

    late, early = sample.begin("Where?"), sample.begin("Where?")
    assert sample.begin("Where?") is None, "two are enough"
    end(early, 1.0)
    assert [each.reward for each in sample.take()] == [1.0]
    following = sample.begin("Where?")
    end(late, 2.0)
    end(following, 3.0)
    assert [each.reward for each in sample.take()] == [3.0]
    assert sample.take() == []


def test_the_saved_controller_acts_like_the_trained_one(run):
    folder = run.path / "checkpoints" / "000002"
    settings = json.loads((folder / "view.json").read_text(encoding="utf-8"))
    view = DiscreteActions(AgenticRAGEnv(dataset=DATASET | {"split": "test"}, max_turns=2), **settings)
    from sb3_contrib import MaskablePPO as Library

    model = Library.load(folder / "model.zip", device="cpu")
    written = read_trajectories(run.path / "trajectories" / "test-maskable_ppo-greedy.jsonl.gz")
    for index, trajectory in enumerate(written[:4]):
        observation, _ = view.reset(options={"question_index": index})
        for turn in trajectory.turns:
            action, _ = model.predict(observation, deterministic=True, action_masks=view.action_masks())
            observation, *_, info = view.step(action)
            assert (info["query"], info["answer"]) == (turn.info["query"], turn.info["answer"])


def test_same_seed_same_run_and_another_seed_another_one(run, tmp_path):
    again, other = train(tmp_path / "again"), train(tmp_path / "other", "seed=1")
    assert again.metrics_without_times() == run.metrics_without_times()
    assert again.transcripts() == run.transcripts()
    assert again.summary["evaluation"] == run.summary["evaluation"]
    assert other.metrics_without_times() != run.metrics_without_times()


def test_an_interrupted_run_begins_again_and_comes_to_the_same(run, tmp_path):
    path = tmp_path / "run"
    interrupted = patch.object(MaskablePPO, "save", side_effect=KeyboardInterrupt)
    with interrupted:
        assert command(*SMALL, f"hydra.run.dir={path}").code == 130
    assert (path / "metrics.jsonl").exists()
    assert not (path / "summary.json").exists()
    again = command(f"resume={path}")
    assert again.code == 0, again.err
    assert "keeps no training state, so the run begins again" in again.out
    again.path = path
    assert again.metrics_without_times() == run.metrics_without_times()
    assert again.transcripts() == run.transcripts()


def test_it_learns_to_answer_what_it_found():
    """One hop in a small world, for a few seconds: far from its best, but not by chance."""
    config = MaskablePPOConfig(
        total_env_steps=3072, turns_per_update=64, batch_size=128, learning_rate=5e-3, max_candidates=4
    )
    dataset = {"name": "tiny", "seed": 100, "subset": "single_hop", "num_passages": 300, "num_questions": 200}
    env = AgenticRAGEnv(dataset=dataset, max_turns=2)
    words = DiscreteActions(env)
    query_words = tuple(word for word in words.query_words if word in ("born", "lives", "works"))

    def make_view() -> DiscreteActions:
        inner = AgenticRAGEnv(dataset=env.dataset, retriever=env.retriever, max_turns=2)
        return DiscreteActions(inner, 4, words.question_words + words.query_words, query_words)

    class Settings:
        seed, num_envs, max_retriever_error_fraction = 0, 8, 0.0

    exact_match: list[float] = []
    learner = MaskablePPO(config)
    learner.train(make_view, Settings, lambda metrics: exact_match.append(metrics["rollout/exact_match"]))
    assert np.mean(exact_match[-2:]) > 1.5 * exact_match[0]


def test_an_episode_without_an_answer_earns_nothing():
    config = MaskablePPOConfig(total_env_steps=64, turns_per_update=64, batch_size=32, hidden_size=8)
    env = AgenticRAGEnv(dataset={"name": "tiny", "num_questions": 60}, max_turns=1, final_turn="none")

    class Settings:
        seed, num_envs, max_retriever_error_fraction = 0, 1, 0.0

    learner, told = MaskablePPO(config), []
    learner.train(lambda: DiscreteActions(env), Settings, told.append)
    assert told[0]["rollout/out_of_turns_fraction"] == told[0]["rollout/truncated_fraction"] > 0.5
    assert told[0]["rollout/answered_fraction"] == 1 - told[0]["rollout/truncated_fraction"]
    assert set(np.unique(learner.model.rollout_buffer.rewards)) <= {0.0, 1.0}


def test_nothing_is_learned_from_an_episode_that_a_failed_search_ended():
    config = MaskablePPOConfig(total_env_steps=64, turns_per_update=64, batch_size=32, hidden_size=8)
    faulty = {"name": "faulty", "error_fraction": 0.5}
    env = AgenticRAGEnv(
        dataset={"name": "tiny", "num_questions": 60}, max_turns=1, retriever=faulty, reward=lambda _: 0.5
    )

    class Settings:
        seed, num_envs, max_retriever_error_fraction = 0, 1, 1.0

    learner, told = MaskablePPO(config), []
    learner.train(lambda: DiscreteActions(env), Settings, told.append)
    buffer = learner.model.rollout_buffer
    failed = np.isclose(buffer.advantages.ravel(), 0) & (buffer.returns.ravel() == buffer.values.ravel())
    assert told[0]["rollout/retriever_errors"] == failed.sum() > 10
    assert told[0]["rollout/reward"] == 0.5 * (1 - told[0]["rollout/search_failed_fraction"])


def test_actions_are_picked_by_their_probability():
    log_probs, draw = np.log([0.2, 0.7, 0.1, 1e-30]), np.random.default_rng(0)
    log_probs[3] = -np.inf
    assert pick(log_probs, 0, draw) == 1
    for temperature, expected in ((1.0, [0.2, 0.7, 0.1, 0]), (0.5, [4 / 54, 49 / 54, 1 / 54, 0])):
        counts = np.bincount([pick(log_probs, temperature, draw) for _ in range(4000)], minlength=4)
        np.testing.assert_allclose(counts / 4000, expected, atol=0.03)
        assert counts[3] == 0


def test_too_many_failed_searches_stop_the_run(run):
    class Settings:
        max_retriever_error_fraction = 0.5

    failed, fine = {"error": "no route"}, {"error": None}
    check_failures([failed, fine], Settings)
    with pytest.raises(RetrieverError, match=r"2 of 3 episodes .* allows; the last one: no route"):
        check_failures([failed, fine, failed], Settings)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_the_library_the_extra_is_named(tmp_path):
    with patch.dict(sys.modules, {"sb3_contrib": None}):
        run = command(*SMALL, f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert 'pip install "agentic-rag-env[sb3]"' in run.err
    assert "Traceback" not in run.err


def test_a_complete_run_cannot_be_resumed(run):
    again = command(f"resume={run.path}")
    assert again.code == 1
    assert "holds a complete run of maskable_ppo, which can't be resumed" in again.err


def test_a_run_whose_summary_is_damaged_begins_again(run, tmp_path):
    path = shutil.copytree(run.path, tmp_path / "run")
    (path / "summary.json").write_text('{"algo": ')
    with patch.object(OutsideRun, "train", side_effect=KeyboardInterrupt) as train:
        assert command(f"resume={path}").code == 130
    assert train.called


def test_nothing_starts_from_it_and_it_starts_from_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match="maskable_ppo trains no language model, so nothing can start from it"):
        build_stages({"name": "ppo", "warm_start": {"name": "maskable_ppo"}})
    run = command(*SMALL, "algo.warm_start=sft", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "warm_start" in run.err


def test_evaluate_says_where_its_figures_are(run):
    with pytest.raises(ConfigurationError, match=r"trained maskable_ppo, which is no language model.*summary\.json"):
        evaluate.find(str(run.path))


class Hurried(AgenticRAGVectorEnv):
    """Takes something off for every turn."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards - 0.1, *rest


def test_an_environment_with_rules_of_its_own_is_refused():
    assert single(AgenticRAGVectorEnv(1, dataset=DATASET, max_turns=3)).rules.max_turns == 3
    with pytest.raises(ConfigurationError, match=r"needs env=agentic_rag, got a Hurried\."):
        single(Hurried(1, dataset=DATASET))


def test_a_batch_of_one_turn_is_refused():
    class Settings:
        seed, num_envs, max_retriever_error_fraction = 0, 3, 0.0

    learner = MaskablePPO(MaskablePPOConfig(turns_per_update=11, batch_size=16))
    with pytest.raises(ConfigurationError, match=r"33 turns per update .* in batches of 16 leave a batch of one"):
        learner.train(lambda: None, Settings, print)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"total_env_steps": 0}, "total_env_steps must be an integer of at least 1, got 0"),
        ({"turns_per_update": 0}, "turns_per_update must be an integer of at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"discount": 1.5}, r"discount must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        MaskablePPOConfig(**setting)
