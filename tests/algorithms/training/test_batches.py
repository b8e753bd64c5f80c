"""What an algorithm declares about its trajectories, and what happens when it asks for something else."""

from __future__ import annotations

import re
from unittest.mock import patch

import numpy as np
import pytest
from small_runs import PPO, SFT, TINY, command, train
from test_preflight import composed

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from algorithms.learner.algorithm import Algorithm, AlgorithmConfig, Progress
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Trajectory, Turn
from algorithms.training.batches import choose_source, without_failed_searches
from algorithms.training.demonstrations.teacher import Teacher
from algorithms.training.trainer import Trainer


class Wilful(Algorithm):
    """Answers what it is told to."""

    name = "wilful"
    trains_on = frozenset({"policy", "replay"})
    replay_capacity = 3

    def __init__(self, answer: str) -> None:
        super().__init__(AlgorithmConfig())
        self.answer = answer

    def source(self, progress, rng):
        return self.answer

    def num_steps(self, num_demonstrations):
        return 10

    def token_loss(self, tokens):
        return -tokens.logprobs


def chosen(answer: str, replay_size: int) -> str:
    return choose_source(Wilful(answer), Progress(4, 10, replay_size), np.random.default_rng(0))


def test_what_is_declared_and_there_is_had():
    assert chosen("policy", 0) == "policy"
    assert chosen("replay", 1) == "replay"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("teacher", "wilful: source returned 'teacher', which is none of what trains_on declares: policy, replay."),
        ("polcy", "source returned 'polcy'"),
        ("replay", "returned 'replay' in step 4, with nothing kept to replay; let the policy play first, and set "
                   "replay_capacity (now 3)"),
    ],
)  # fmt: skip
def test_what_is_not_declared_or_not_there_is_an_error(answer, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        chosen(answer, 0)


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("needs", "teacher_logit", "Misspelled.needs declares 'teacher_logit'. Did you mean 'teacher_logits'?"),
        ("trains_on", "student", "Misspelled.trains_on declares 'student'. Known: policy, replay, teacher."),
    ],
)
def test_a_declaration_that_nobody_understands_is_an_error(field, given, said):
    misspelled = type("Misspelled", (Algorithm,), {field: frozenset({given})})
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        misspelled(AlgorithmConfig())


@pytest.mark.parametrize("of_each", [5, 100, 0])
def test_a_batch_that_can_not_be_made_of_whole_groups_is_an_error(of_each):
    grouped = type("Grouped", (Wilful,), {"rollouts_per_prompt": of_each})
    said = f"Grouped.rollouts_per_prompt must be a divisor of batch_size (64), got {of_each}."
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        grouped("policy")
    assert type("Grouped", (Wilful,), {"rollouts_per_prompt": 8})("policy").rollouts_per_prompt == 8
    stored = type("Stored", (Wilful,), {"rollouts_per_prompt": of_each, "trains_on": frozenset({"replay"})})
    assert stored("replay").rollouts_per_prompt == of_each, "nobody plays for it"


def played(group: int, error: str | None = None) -> Trajectory:
    ids = np.array([1, 2])
    turn = Turn(ids, np.zeros(2, np.float32), ids[:0], {"error": error})
    return Trajectory(ids, [turn], group, "policy", 0.0, False, error is None, error is not None)


def test_groups_with_a_failed_search_go_as_a_whole():
    episodes = [played(0), played(0), played(1), played(1, "no answer"), played(2), played(2)]
    assert without_failed_searches(episodes) == [*episodes[:2], *episodes[4:]]
    assert without_failed_searches([played(0, "no answer")]) == []


def test_episodes_of_failed_searches_teach_nothing(tmp_path, cache):
    trained, update = [], Learner.update

    def watched(learner, batch, *args, **kwargs):
        trained.append(len(batch))
        return update(learner, batch, *args, **kwargs)

    settings = ["algo=ppo", *PPO, "model.policy=tiny-teacher", "model.teacher=null", "probes=[]", "evaluation.every=0"]
    faulty = ["retriever=faulty", "retriever.error_fraction=0.1", "max_retriever_error_fraction=0.9"]
    with patch.object(Learner, "update", watched):
        run = train(tmp_path / "run", cache, *settings, *faulty, "evaluation.num_questions=8")
    failed = [int(row["rollout/retriever_errors"]) for row in run.metrics]
    assert sum(failed) > 0
    assert trained == [16 - each for each in failed]


def test_a_step_whose_every_search_fails_ends_the_run(tmp_path, cache):
    settings = ["algo=ppo", *PPO, "model.policy=tiny-teacher", "model.teacher=null", "probes=[]", "evaluation.every=0"]
    faulty = ["retriever=faulty", "retriever.error_fraction=1", "max_retriever_error_fraction=1"]
    run = command(*TINY, *settings, *faulty, f"hydra.run.dir={tmp_path}", f"cache_dir={cache}")
    assert run.code == 1
    assert (
        "Failed searches leave 0 of 16 episodes of training step 1 to learn from, fewer than the minibatches" in run.err
    )


def test_no_stage_trains_on_what_a_later_one_is_validated_on(tmp_path, cache):
    stages = [each.replace("algo.", f"algo.{stage}") for stage in ("", "warm_start.") for each in SFT]
    config = composed(*TINY, "algo=distillm", *stages, "algo.num_validation=4", f"cache_dir={cache}")
    trainer = Trainer(config, tmp_path / "run")
    sft, distillm = trainer.stages
    held_out, *trained_on = (
        {one.turns[-1].info["question_id"] for one in found}
        for found in (trainer.sources.held_out(distillm), *map(trainer.sources.to_train_on, (sft, distillm)))
    )
    assert len(held_out) == 4
    assert not any(held_out & questions for questions in trained_on)
    assert [len(questions) for questions in trained_on] == [20, 20]


def test_a_temperature_without_a_gradient_is_refused_before_anybody_demonstrates(tmp_path):
    config = composed(*TINY, "algo=sft", *SFT, "rollout.temperature=0", f"cache_dir={tmp_path}")
    with pytest.raises(ConfigurationError, match=r"rollout\.temperature=0(\.0)? has no gradient"):
        Trainer(config, tmp_path / "run")
    assert not list(tmp_path.rglob("*.jsonl.gz"))


class Unknown:
    """A retriever that can't say what it searches, as most services can't."""

    def __init__(self, retriever):
        self._retriever = retriever

    def search(self, queries, top_k):
        return self._retriever.search(queries, top_k)


def test_demonstrations_over_an_unknown_index_stay_in_their_run(tmp_path, monkeypatch):
    build = RETRIEVERS.build
    monkeypatch.setattr(RETRIEVERS, "build", lambda *args, **more: Unknown(build(*args, **more)))
    config = composed(*TINY, "algo=sft", *SFT, f"cache_dir={tmp_path / 'cache'}")
    asked, played, play = [], [], Teacher.play
    monkeypatch.setattr(Teacher, "play", lambda *args: asked.append(1) or play(*args))
    for run in ("a", "a", "b"):
        asked.clear()
        trainer = Trainer(config, tmp_path / run)
        assert len(trainer.sources.to_train_on(trainer.stages[0])) == 24
        played.append(bool(asked))
    assert played == [True, False, True], "a run reads what it has kept, and another run asks anew"
    assert {file.parent for file in tmp_path.rglob("*.jsonl.gz")} == {
        tmp_path / run / "demonstrations" for run in ("a", "b")
    }
