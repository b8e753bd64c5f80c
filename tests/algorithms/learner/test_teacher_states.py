"""States of the teacher that are kept give the losses and gradients of states computed anew."""

import numpy as np
import pytest
import torch
from toy_learner import VOCAB, make_learner

from agentic_rag_env.types import blank_info
from algorithms.kd import KD, KDConfig
from algorithms.learner import teacher_states
from algorithms.learner.collate import collate
from algorithms.learner.teacher_states import TeacherStates
from algorithms.learner.types import Trajectory, Turn


def trajectory(number: int, *sizes: int) -> Trajectory:
    """A prompt and turns of these numbers of action tokens, each followed by an observation of two."""
    rng = np.random.default_rng(number)

    def ids(count: int) -> np.ndarray:
        return rng.integers(2, VOCAB, count)

    turns = [Turn(ids(size), np.zeros(size), ids(2), blank_info(str(number), 1)) for size in sizes]
    return Trajectory(ids(3 + number % 2), turns, number, "teacher", 1.0, True, terminated=True, truncated=False)


STORED = [trajectory(number, *sizes) for number, sizes in enumerate([(3, 2), (5,), (1, 4, 2), (2, 2), (6,)])]


@pytest.mark.parametrize("micro_batch_tokens", [4096, 20])
def test_the_same_step_without_another_pass_of_the_teacher(micro_batch_tokens, monkeypatch):
    monkeypatch.setattr(teacher_states, "_BLOCK", 2)
    figures, weights = [], []
    for kept in (False, True):
        learner = make_learner(KD(KDConfig(batch_size=3)), micro_batch_tokens=micro_batch_tokens)
        rows = [4, 0, 2]
        batch = collate([STORED[row] for row in rows], 0)
        if kept:
            states = TeacherStates(STORED, lambda some: collate(some, 0), learner.scorer, learner.teacher)
            assert states.num_tokens == sum(each.num_tokens for each in STORED)
            learner.teacher_states = states
            states.mark(batch, [STORED[row] for row in rows])
            monkeypatch.setattr(type(learner.scorer), "hidden_of_teacher", None)  # nobody may call it now
        figures.append(learner.update(batch, np.random.default_rng(0))["loss"])
        weights.append(torch.cat([each.detach().flatten() for each in learner.policy.parameters()]))
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_what_is_kept(monkeypatch):
    teacher = make_learner(KD(KDConfig())).teacher
    written, width, size = 3 + 2 + 5 + 1 + 4 + 2 + 2 + 2 + 6, 16, 4
    assert TeacherStates.fit(STORED, teacher)
    assert not TeacherStates.fit([], teacher)
    monkeypatch.setattr(teacher_states, "MAX_BYTES", written * width * size - 1)
    assert not TeacherStates.fit(STORED, teacher)
