"""Trajectories of the teacher: which are kept, how many are asked for, and what happens where there are too few."""

from __future__ import annotations

import gzip
import json
import shutil
from unittest.mock import patch

import pytest
from small_runs import DGPO, SFT, TINY, assert_same_run, command, resume, train

from agentic_rag_env.errors import RetrieverError
from algorithms.learner.config import FILTERS, DemonstrationsConfig
from algorithms.learner.networks import load_tokenizer
from algorithms.rollout.player import Player
from algorithms.training.build import Environments, Networks
from algorithms.training.demonstrations import Demonstrations, cached, collect, reason_to_drop
from algorithms.training.demonstrations.teacher import Teacher
from algorithms.training.model_names import resolve_model
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

IGNORANT = "model.teacher=tiny-student"
SKIPPED = (
    r"kd is SKIPPED: the teacher was right on 0 of 60 training questions, and 24 demonstrations are "
    r"wanted.*give more training questions.*algo\.warm_start\.correct_only=false"
)


@pytest.fixture(scope="module")
def teacher():
    """The bundled teacher in front of 60 training questions, 16 at once."""
    world = {"split": "train", "num_passages": 150, "num_questions": 60}
    given = vars(EvaluateConfig()) | {"evaluation": {}, "num_envs": 16, "dataset": world}
    config = evaluate_config(given, resolve_model("tiny-teacher"), {})
    config.model.teacher = "tiny-teacher"
    networks = Networks(config)
    return Teacher(
        DemonstrationsConfig(), networks, Environments(config, networks.tokenizer).envs("train"), config.rollout
    )


def ids(found: Demonstrations) -> list[str]:
    return [trajectory.turns[-1].info["question_id"] for trajectory in found.trajectories]


def test_asking_ends_with_enough_or_with_the_most_questions(teacher):
    enough = collect(teacher, 10, max_questions=60, seed=0)
    assert enough.counts() | {"dropped": {}} == {"wanted": 10, "found": 10, "asked": 16, "dropped": {}}, (
        "one round of 16 episodes brings ten right ones"
    )
    assert all(trajectory.correct for trajectory in enough.trajectories)

    bounded = collect(teacher, 60, max_questions=20, seed=0)
    assert bounded.num_asked == 20
    assert 10 <= len(bounded.trajectories) <= 20
    assert ids(bounded)[:10] == ids(enough), "the same questions in the same order"

    everything = collect(teacher, 100, max_questions=400, seed=0)
    assert everything.num_asked == 60, "each question once"
    assert len(set(ids(everything))) == len(everything.trajectories)
    assert everything.num_sampled_tokens > sum(t.num_action_tokens for t in everything.trajectories)


def test_wrong_answers_are_kept_on_request_but_nothing_malformed(teacher):
    right = collect(teacher, 60, max_questions=60, seed=0)
    answered = collect(teacher, 60, max_questions=60, filters=["well_formed"], seed=0)
    assert set(ids(right)) < set(ids(answered))
    for trajectory in answered.trajectories:
        assert trajectory.terminated
        assert all(turn.info["action"] != "malformed" for turn in trajectory.turns)
    wrong = [trajectory for trajectory in answered.trajectories if not trajectory.correct]
    assert wrong
    assert {reason_to_drop(trajectory, FILTERS, 48) for trajectory in wrong} == {"wrong"}
    assert {reason_to_drop(trajectory, ["well_formed"], 48) for trajectory in wrong} == {None}


def test_a_crash_costs_one_rollout_of_the_teacher(teacher, tmp_path):
    rollout, asked = Player.rollout, []

    def failing(engine, questions, **settings):
        asked.append(questions)
        if len(asked) == 2:
            raise RetrieverError("the server is gone")
        return rollout(engine, questions, **settings)

    settings = {"max_questions": 60, "seed": 0}
    with patch.object(Player, "rollout", failing):
        with pytest.raises(RetrieverError):
            collect(teacher, 60, **settings, parts=tmp_path)
        taken_over = collect(teacher, 60, **settings, parts=tmp_path)
    assert asked[2] == asked[1], "the first questions are not asked again"
    whole = collect(teacher, 60, **settings)
    assert ids(taken_over) == ids(whole)
    assert taken_over.counts() == whole.counts()
    assert taken_over.num_sampled_tokens == whole.num_sampled_tokens


def test_the_outcome_is_read_back_whole_and_not_made_twice(teacher, tmp_path):
    tokenizer = load_tokenizer(resolve_model("tiny-teacher"))
    path = tmp_path / "key.jsonl.gz"
    made = collect(teacher, 3, max_questions=16, seed=0)
    for outcome in (made, Demonstrations([], 7, 28, 123)):
        read = cached(path, lambda outcome=outcome: outcome, tokenizer)
        again = cached(path, lambda: pytest.fail("collected again"), tokenizer)
        assert read.counts() == again.counts() == outcome.counts()
        assert again.num_sampled_tokens == outcome.num_sampled_tokens
        assert ids(again) == ids(outcome)
        for file in tmp_path.iterdir():
            file.unlink()


def test_half_written_damaged_and_foreign_demonstrations_are_collected_again(teacher, tmp_path):
    tokenizer = load_tokenizer(resolve_model("tiny-teacher"))
    path, seal = tmp_path / "key.jsonl.gz", tmp_path / "key.jsonl.gz.seal"
    made = collect(teacher, 8, max_questions=16, seed=0)
    cached(path, lambda: made, tokenizer)
    whole = {file: file.read_bytes() for file in (path, seal)}
    other = tmp_path / "other.jsonl.gz"
    cached(other, lambda: Demonstrations(made.trajectories[:2], 8, 16, 5), tokenizer)
    foreign = {path: other.read_bytes(), seal: (tmp_path / "other.jsonl.gz.seal").read_bytes()}
    half = gzip.compress(b"".join(gzip.decompress(whole[path]).splitlines(True)[:4]))
    for damage in (
        {seal: None},  # a crash after the first of the two files
        {path: None},
        {path: b""},
        {path: half},  # valid in itself, with 4 of 8 rows
        {path: whole[path][:-20]},
        {seal: b"{"},
        {seal: b"[]"},
        {seal: whole[seal].replace(b'"num_asked": 16', b'"num_asked": 61')},
        foreign,
    ):
        for file, content in {**whole, **damage}.items():
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"key\.jsonl\.gz is made again: "):
            again = cached(path, lambda: made, tokenizer)
        assert again.counts() == made.counts()
        read = cached(path, lambda: pytest.fail("collected again"), tokenizer)
        assert (ids(read), read.num_sampled_tokens) == (ids(made), made.num_sampled_tokens)


def test_fewer_than_wanted_are_trained_on_with_a_warning(tmp_path, cache):
    few = ["algo.max_questions_per_demonstration=1", "algo.num_demonstrations=32", "evaluation.temperatures=[0]"]
    with pytest.warns(UserWarning, match=r"right on \d+ of 32 .*; training goes on with .*ask more \(algo\.max"):
        run = train(tmp_path / "run", cache, "algo=sft", *SFT, *few)
    counts = run.summary["demonstrations"]["sft"]
    assert counts["wanted"] == counts["asked"] == 32
    assert 16 <= counts["found"] < 32
    assert run.summary["stages"][0]["steps"] == 2 * -(-counts["found"] // 8)
    assert f"sft: {counts['found']} demonstrations of 32 wanted, from 32 training questions" in run.out
    assert run.summary["costs"]["teacher_sampled_tokens"] > 0


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, cache):
    """DGPO whose teacher knows nothing, so that there is no cold start."""
    with pytest.warns(UserWarning, match=SKIPPED):
        return train(tmp_path_factory.mktemp("runs") / "skipped", cache, *DGPO, IGNORANT)


def test_a_stage_without_any_is_skipped(skipped):
    summary = skipped.summary
    counts = summary["demonstrations"]["kd"]
    assert sum(counts["dropped"].values()) == 60
    assert (counts["wanted"], counts["found"], counts["asked"]) == (24, 0, 60)
    assert [(stage["name"], stage["steps"], stage["checkpoint"]) for stage in summary["stages"]] == [
        ("kd", 0, None),
        ("dgpo", 4, "checkpoints/000004"),
    ]
    assert list(summary["evaluation"]) == ["raw", "dgpo", "teacher"]
    assert {gain["over"] for gain in summary["gain"].values()} == {"raw"}
    assert {row["stage"] for row in skipped.metrics} == {"dgpo"}
    assert "kd: SKIPPED for want of demonstrations" in skipped.out


def test_a_run_without_its_first_stage_resumes_exactly(skipped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(skipped.path, run)
    shutil.rmtree(run / "checkpoints" / "000004")
    (run / "summary.json").unlink()
    with pytest.warns(UserWarning, match="SKIPPED"):
        assert_same_run(resume(run), skipped)


@pytest.mark.parametrize("algo", ["sft", "kd"])
def test_nothing_to_train_on_at_all_is_an_error(algo, tmp_path, cache):
    run = command(*TINY, f"algo={algo}", *SFT, IGNORANT, f"hydra.run.dir={tmp_path}/run", f"cache_dir={cache}")
    assert run.code == 1
    assert f"{algo} has nothing to train on: the teacher was right on 0 of" in run.err
    assert "algo.correct_only=false" in run.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_each_model_reads_prompts_through_its_own_chat_template(tmp_path):
    """Alone the teacher is right nearly always, so it must be beside a student with a template, too."""
    student = tmp_path / "student"
    shutil.copytree(resolve_model("tiny-student"), student)
    settings = json.loads((student / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}? ? ? {{ m.content }}{% endfor %}"
    (student / "tokenizer_config.json").write_text(json.dumps(settings))
    run = train(tmp_path / "run", tmp_path / "cache", *DGPO, f"model.policy={student}")
    found = run.summary["demonstrations"]["kd"]
    assert found["found"] == 24
    assert found["asked"] < 48
    assert run.summary["evaluation"]["teacher"]["greedy"]["all"]["exact_match"] > 0.8
    with gzip.open(tmp_path / "run" / "trajectories" / "train-000002.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert all(row["prompt"].startswith("? ? ?") for row in rows), "demonstrations stand behind the student's prompts"
    assert not any(row["message"].startswith("?") for row in rows)
