"""Sharded networks learn what whole ones learn, however unevenly the episodes lie on the processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import join, start, told
from test_zoo_step import ZOO, build
from toy_learner import VOCAB, make_batch, make_model

from algorithms.learner import networks, ranks, sharding
from algorithms.learner.algorithm import Role
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import Critic, freeze
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch

#: Few tokens go through a backbone at once, so that processes with another number of rows make more passes.
SETTINGS = {"precision": "float64", "micro_batch_tokens": 20, "chunk_tokens": 5}


EMBEDDING = "policy.model.embed_tokens.weight"


def model(seed: int):
    made = make_model(seed).double()
    networks._keep_norms_in_float64(made)
    return made


def learner_of(name: str, *, sharded: bool) -> Learner:
    place = sharding.shard if sharded else lambda network: network
    algorithm = build(name)
    policy = model(0)
    critic = place(Critic(policy)) if Role.CRITIC in algorithm.roles else None
    others = {"reference": (Role.REFERENCE, 100), "teacher": (Role.TEACHER, 200)}
    given = {key: place(freeze(model(seed))) for key, (role, seed) in others.items() if role in algorithm.roles}
    config = LearnerConfig(**SETTINGS)
    return Learner(algorithm, place(policy), critic=critic, config=config, total_steps=9, vocab_size=VOCAB, **given)


def batch_of(num_rows: int) -> Batch:
    batch = make_batch(num_rows=6).select(range(num_rows))
    batch.old_logprobs, batch.rewards = batch.old_logprobs.double(), batch.rewards.double()
    batch.group_ids = torch.arange(num_rows) // 3
    return batch


def train(learner: Learner) -> list[dict[str, float]]:
    """Steps on six, on three and on one episode: of two processes, one has nothing to do in the last.

    Groups have at least two.
    """
    found = []
    last = 2 if hasattr(learner.algorithm.config, "rollouts_per_prompt") else 1
    for seed, num_rows in enumerate((6, 3, last)):
        batch = batch_of(num_rows)
        found.append({"before": learner.validate(batch)} if "teacher_logits" in learner.algorithm.needs else {})
        learner.score(batch)
        found.append(learner.update(batch, np.random.default_rng(seed)))
    return found


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    trained = {"policy": learner.policy} | ({} if learner.critic is None else {"critic": learner.critic})
    return {
        f"{role}.{name}": sharding.whole(parameter.detach())
        for role, network in trained.items()
        for name, parameter in network.named_parameters()
    }


def compare(folder: Path, names: list[str]) -> None:
    ranks.join()
    for name in names:
        plain, sharded = learner_of(name, sharded=False), learner_of(name, sharded=True)
        expected, figures = train(plain), train(sharded)
        report = {
            "weights": max(float((weights(sharded)[key] - value).abs().max()) for key, value in weights(plain).items()),
            "figures": [
                max((abs(mine[key] - one[key]) for key in one if key != "explained_variance"), default=0.0)
                for mine, one in zip(figures, expected, strict=True)
            ],
            "moved": float((weights(plain)[EMBEDDING] - model(0).lm_head.weight.detach()).abs().max()),
            "share": sum(each.to_local().numel() for each in sharded.policy.parameters())
            / sum(each.numel() for each in plain.policy.parameters()),
        }
        # What is saved is whole, in the first process, and goes on in any number of processes.
        saved = sharded.state_dict()
        tensors = [value for each in saved["policy_optimizer"]["state"].values() for value in each.values()]
        assert ranks.is_first() or set(tensors) == {None}
        saved = ranks.decided(lambda saved=saved: copy.deepcopy(saved))
        revived = learner_of(name, sharded=True)
        for role in ("policy", "critic"):
            if (network := getattr(sharded, role)) is not None:
                whole = sharding.whole_state(network.state_dict())
                sharding.load_state(getattr(revived, role), ranks.decided(lambda whole=whole: whole))
        revived.load_state_dict(saved)
        for each in (plain, sharded, revived):
            train(each)
        report["again"] = [
            max(float((weights(each)[key] - value).abs().max()) for key, value in weights(plain).items())
            for each in (sharded, revived)
        ]
        if ranks.is_first():
            (folder / f"{name}.json").write_text(json.dumps(report))
    ranks.leave()


def assert_same(folder: Path, count: int) -> None:
    processes = start(count, folder, compare, folder, ZOO)
    join(processes, 600)
    assert [process.exitcode for process in processes] == [0] * count, told(folder)
    for name in ZOO:
        found = json.loads((folder / f"{name}.json").read_text())
        assert found["moved"] > 1e-4, (name, found)
        assert max(found["weights"], *found["figures"], *found["again"]) < 1e-10, (name, found)
        assert found["share"] < 1 / count + 0.1, (name, found)


def test_every_algorithm_learns_the_same_with_sharded_networks(tmp_path):
    assert_same(tmp_path, 2)


@pytest.mark.nightly
def test_every_algorithm_learns_the_same_on_three_processes(tmp_path):
    assert_same(tmp_path, 3)
