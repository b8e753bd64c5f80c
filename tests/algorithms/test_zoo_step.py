"""One training step of every algorithm of the registry, on real networks; and, nightly, that each of them learns."""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
from small_runs import command
from toy_learner import make_batch, make_learner, make_model

from algorithms.learner.adapters import trained_state
from algorithms.learner.algorithm import ALGORITHMS, Algorithm
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch
from algorithms.training import checkpoint
from algorithms.training.schemas import import_zoo

import_zoo()
ZOO = [name for name in ALGORITHMS.names() if issubclass(ALGORITHMS.get(name).factory, Algorithm)]


def build(name: str, **settings) -> Algorithm:
    """With a critic that does not wait, and groups that a batch of six has."""
    fields = ALGORITHMS.get(name).config.__dataclass_fields__
    small = {"batch_size": 6, "rollouts_per_prompt": 3, "num_minibatches": 1, "critic_warmup_steps": 0}
    small |= {"num_demonstrations": 200, **settings}
    return ALGORITHMS.build({"name": name, **{key: value for key, value in small.items() if key in fields}})


def batch_of_groups() -> Batch:
    batch = make_batch()
    batch.group_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    return batch


def step(learner: Learner, batch: Batch, seed: int = 0) -> dict[str, float]:
    learner.score(batch)
    return learner.update(batch, np.random.default_rng(seed))


def weights(learner: Learner) -> list[torch.Tensor]:
    networks = [learner.policy] + ([learner.critic] if learner.critic is not None else [])
    return [parameter.detach().clone() for network in networks for parameter in network.parameters()]


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_a_step_is_finite_moves_the_weights_and_is_the_same_for_the_same_seed(name):
    learner = make_learner(build(name))
    before = weights(learner)
    metrics = step(learner, batch_of_groups())
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    moved = [not torch.equal(old, new) for old, new in zip(before, weights(learner), strict=True)]
    assert any(moved)
    again = make_learner(build(name))
    assert step(again, batch_of_groups()) == metrics
    assert_equal(weights(learner), weights(again))


@pytest.mark.parametrize("name", ZOO)
def test_what_a_model_did_not_write_is_no_label(name):
    """Words after the last one written condition nothing that is learned; as labels they would."""
    batch, other = batch_of_groups(), batch_of_groups()
    last = torch.where(other.response_mask, torch.arange(18), -1).amax(1)
    after = (torch.arange(18) > last[:, None]) & other.attention_mask
    assert after.any()
    other.input_ids[after] = (other.input_ids[after] + 1) % 23
    learners = [make_learner(build(name)) for _ in range(2)]
    first, second = (step(learner, each) for learner, each in zip(learners, (batch, other), strict=True))
    assert first == second
    assert_equal(*map(weights, learners))


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_brings_back_the_next_step(name, tmp_path):
    learner, batch = make_learner(build(name)), batch_of_groups()
    step(learner, batch)
    learner.algorithm.after_validation(1.0)

    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    path = checkpoint.save(
        tmp_path,
        1,
        policy=learner.policy,
        tokenizer=NoTokenizer(),
        critic_state=None if learner.critic is None else trained_state(learner.critic),
        learner_state=learner.state_dict(),
        trainer_state={},
    )
    revived = make_learner(build(name), policy=make_model(55))
    saved = checkpoint.load(path, policy=revived.policy, critic=revived.critic)
    revived.load_state_dict(saved.learner)
    assert json.dumps(revived.algorithm.state_dict()) == json.dumps(learner.algorithm.state_dict())
    assert step(revived, batch_of_groups(), seed=1) == step(learner, batch_of_groups(), seed=1)
    assert_equal(weights(learner), weights(revived))


@pytest.mark.parametrize("name", ZOO)
def test_a_file_has_at_most_eighty_lines_of_code(name):
    source = inspect.getsource(sys.modules[ALGORITHMS.get(name).factory.__module__])
    lines = {
        number: text
        for number, text in enumerate(source.splitlines(), 1)
        if text.strip() and not text.lstrip().startswith("#")
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines.pop(number, None)
    assert len(lines) <= 80


#: Single hops, 400 demonstrations. What starts from nothing but rewards, starts from KD here.
EASY = [
    "dataset.subset=single_hop", "threads=2", "evaluation.every=0", "evaluation.num_questions=300",
    "evaluation.temperatures=[0.0]",
]  # fmt: skip


#: At its default learning rate it unlearns some of what SFT has learned: 0.74.
SLOWER = {"distillm": ["algo.optimizer.learning_rate=1e-3"]}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ZOO)
def test_every_algorithm_solves_an_easy_world(name, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    algorithm = ALGORITHMS.build(name)
    settings = [f"algo={name}", *SLOWER.get(name, [])]
    if hasattr(algorithm.config, "steps"):
        settings.append("algo.steps=20")
        if algorithm.config.warm_start is None:
            settings.append("algo.warm_start=kd")
    run = command(*EASY, *settings, f"cache_dir={root / 'cache'}", f"hydra.run.dir={root / name}")
    assert run.code == 0, run.err
    summary = json.loads((root / name / "summary.json").read_text())
    final = summary["stages"][-1]["name"]
    assert summary["evaluation"][final]["greedy"]["all"]["exact_match"] >= 0.8
