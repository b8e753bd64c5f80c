"""One step in float32, by one and by two processes: how far the order of sums moves gradients and weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from rank_processes import join, start, told
from test_zoo_step import ZOO, build
from torch import Tensor
from toy_learner import make_batch, make_learner

from algorithms.assets import ASSETS
from algorithms.learner import ranks
from algorithms.learner.networks import load_model

CLOSE = 1e-6


def step(name: str) -> tuple[Tensor, Tensor, float]:
    """All gradients and weights of the bundled student's first step on six episodes, and the highest learning rate."""
    learner = make_learner(build(name), policy=load_model(ASSETS / "tiny-student"))
    gradients: list[Tensor] = []
    optimizers = [each for each in (learner.critic_optimizer, learner.policy_optimizer) if each]  # in their order
    for each in optimizers:
        each.adamw.register_step_pre_hook(
            lambda *_, own=each: gradients.extend(one.grad.flatten() for one in own.parameters)
        )
    batch = make_batch()
    batch.group_ids = torch.arange(6) // 3
    learner.score(batch)
    learner.update(batch, np.random.default_rng(0))
    weights = [one.detach().flatten() for each in optimizers for one in each.parameters]
    return torch.cat(gradients), torch.cat(weights), max(each.learning_rate(0) for each in optimizers)


def compare(folder: Path) -> None:
    ranks.join()
    for name in ZOO:
        gradients, weights, rate = ranks.decided(lambda name=name: step(name))
        own_gradients, own_weights, _ = step(name)
        assert {own_gradients.dtype, own_weights.dtype} == {torch.float32}
        differences, has_gradient = (weights - own_weights).abs(), gradients.abs() > CLOSE
        report = {
            "gradients": float((gradients - own_gradients).abs().max()),
            "weights with a gradient above 1e-6": float(differences[has_gradient].max()),
            "other weights": float(differences[~has_gradient].max()),
            "share of other gradients": float((gradients[~has_gradient] != 0).sum() / (gradients != 0).sum()),
            "learning rate": rate,
        }
        if ranks.is_first():
            (folder / f"{name}.json").write_text(json.dumps(report))
    ranks.leave()


def test_a_step_of_two_processes_is_that_of_one_but_for_rounding(tmp_path):
    """AdamW's first step has the size of the learning rate and the sign of the gradient, however small this is.

    So where a gradient is no larger than its rounding, the step is left to chance. All other weights agree to 1e-6.
    """
    processes = start(2, tmp_path, compare, tmp_path)
    join(processes, 300)
    assert [process.exitcode for process in processes] == [0, 0], told(tmp_path)
    for name in ZOO:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        print(name, found)
        assert max(found["gradients"], found["weights with a gradient above 1e-6"]) < CLOSE, (name, found)
        assert found["other weights"] < 2.01 * found["learning rate"], (name, found)
        assert found["share of other gradients"] < 0.1, (name, found)
