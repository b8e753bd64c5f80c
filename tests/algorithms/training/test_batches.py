"""What an algorithm declares about its trajectories, and what happens when it asks for something else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.algorithm import Algorithm, AlgorithmConfig, Progress
from algorithms.training.batches import choose_source


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
