"""What an algorithm declares about its trajectories, and what happens when it asks for something else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from small_runs import SFT, TINY
from test_preflight import composed

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from algorithms.learner.algorithm import Algorithm, AlgorithmConfig, Progress
from algorithms.training.batches import choose_source
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
