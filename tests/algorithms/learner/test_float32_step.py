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
from algorithms.learner.optimizer import Optimizer

CLOSE = 1e-6


def step(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The bundled student's first step on six episodes.

    Returns:
        All clipped gradients, all weights afterwards, and for each what AdamW's formula makes of its gradient, float64:
        the first running averages are the gradient and its square, so the step is rate * g / (|g| + eps).
    """
    learner = make_learner(build(name), policy=load_model(ASSETS / "tiny-student"))
    gradients: list[Tensor] = []
    moves: list[Tensor] = []

    def note(own: Optimizer) -> None:
        found = torch.cat([one.grad.flatten() for one in own.parameters])
        gradients.append(found)
        moves.append(own.learning_rate(0) * found.double() / (found.double().abs() + own.adamw.defaults["eps"]))

    optimizers = [each for each in (learner.critic_optimizer, learner.policy_optimizer) if each]  # in their order
    for each in optimizers:
        each.adamw.register_step_pre_hook(lambda *_, own=each: note(own))
    batch = make_batch()
    batch.group_ids = torch.arange(6) // 3
    learner.score(batch)
    learner.update(batch, np.random.default_rng(0))
    weights = [one.detach().flatten() for each in optimizers for one in each.parameters]
    return torch.cat(gradients), torch.cat(weights), torch.cat(moves)


def compare(folder: Path) -> None:
    ranks.join()
    for name in ZOO:
        gradients, weights, moves = ranks.decided(lambda name=name: step(name))
        own_gradients, own_weights, own_moves = step(name)
        assert {own_gradients.dtype, own_weights.dtype} == {torch.float32}
        differences = weights.double() - own_weights.double()
        other = differences.abs() >= CLOSE
        report = {
            "gradients": float((gradients - own_gradients).abs().max()),
            "weights, but for what AdamW makes of that": float((differences + moves - own_moves).abs().max()),
            "weights": float(differences.abs().max()),
            "share of weights that differ by more than 1e-6": float(other.sum() / (gradients != 0).sum()),
            "largest gradient of these": max(gradients[other].abs().tolist(), default=0.0),
            "largest gradient": float(gradients.abs().max()),
        }
        if ranks.is_first():
            (folder / f"{name}.json").write_text(json.dumps(report))
    ranks.leave()


def test_a_step_of_two_processes_is_that_of_one_but_for_rounding(tmp_path):
    """Gradients agree to 1e-6, and so do the weights, once AdamW's formula is taken off.

    The first step of AdamW has the size of the learning rate and the sign of the gradient, however small this is. So
    where a gradient is no larger than its rounding, rounding decides the step. These are few weights, and their
    gradients are below 1e-6. Any other weight agrees to 1e-6.
    """
    processes = start(2, tmp_path, compare, tmp_path)
    join(processes, 300)
    assert [process.exitcode for process in processes] == [0, 0], told(tmp_path)
    for name in ZOO:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        print(name, found)
        assert found["gradients"] < CLOSE, (name, found)
        assert found["weights, but for what AdamW makes of that"] < CLOSE, (name, found)
        assert found["largest gradient of these"] < CLOSE, (name, found)
        assert found["share of weights that differ by more than 1e-6"] < 1e-3, (name, found)
