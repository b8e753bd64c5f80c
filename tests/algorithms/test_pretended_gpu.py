"""What runs on a GPU, on the pretended one: nothing mixes devices, and the host seldom waits."""

from __future__ import annotations

import copy
import json
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pretended_gpu import lies_on_it, pretended_gpu
from small_runs import DGPO, train
from test_zoo_step import ZOO, batch_of_groups, build
from toy_learner import make_learner
from toy_policy import make_envs, make_player, make_policy, make_tokenizer

from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from algorithms import evaluate
from algorithms.learner.types import Batch
from algorithms.rollout.config import RolloutConfig


@pytest.fixture
def gpu():
    with pretended_gpu() as pretended:
        yield pretended


# --- the pretended GPU itself ----------------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (here.device.type, there.device.type, (there * 2)[1:].device.type) == ("cpu", "cuda", "cuda")
    for mix in (lambda: here + there, lambda: torch.cat((there, here)), lambda: there @ here):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number is at home everywhere
    assert there.to(here).device.type == there.cpu().device.type == "cpu"
    assert here.to(there).device.type == here.new_tensor([1.0], device="cuda").device.type == "cuda"
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("cuda")).weight.device.type == "cuda"


def test_it_counts_waits_and_launches(gpu):
    there = torch.arange(4.0).to("cuda", non_blocking=True)
    assert not gpu.waits
    assert gpu.launches == {"copy to the GPU": 1}
    gpu.reset()
    waits = (
        lambda: there.sum().item(),
        lambda: bool((there > 1).any()),
        lambda: there.cpu(),
        lambda: there.tolist(),
        lambda: there[there > 1],
        lambda: torch.nonzero(there),
        lambda: torch.ones(4).to("cuda"),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: there.unique(),
    )
    for count, wait in enumerate(waits, 1):
        wait()
        assert sum(gpu.waits.values()) == count
    gpu.reset()
    _ = (there.view(2, 2).T + 1).sum()
    assert gpu.launches == {"aten::add": 1, "aten::sum": 1}
    assert not gpu.waits


def test_it_is_gone_afterwards():
    with pretended_gpu():
        pass
    assert torch.ones(1).device.type == "cpu"
    assert not torch.cuda.is_available()


# --- the zoo ---------------------------------------------------------------------------------------------------------


def moved(batch: Batch) -> Batch:
    """The batch on the GPU."""
    for name in batch.__slots__:
        if isinstance(value := getattr(batch, name), torch.Tensor):
            setattr(batch, name, value.to("cuda"))
    return batch


@pytest.mark.parametrize("name", ZOO)
def test_a_step_of_every_algorithm(name, gpu):
    learner = make_learner(build(name), device="cuda", precision="float32")
    batch = moved(batch_of_groups())
    learner.score(batch)
    metrics = learner.update(batch, np.random.default_rng(0))
    learner.validate(batch)
    assert lies_on_it(next(learner.policy.parameters()))
    other = make_learner(build(name))
    here = batch_of_groups()
    other.score(here)
    assert metrics == pytest.approx(other.update(here, np.random.default_rng(0)), abs=1e-6)


BRIEF = [
    "algo.steps=2", "algo.warm_start.epochs=1", "num_envs=4", "evaluation.num_questions=3",
    "evaluation.num_dev_questions=2", "evaluation.every=1", "probe_every=2",
    "probes=[search_behaviour,source_referencing]",
]  # fmt: skip


def test_a_whole_run_and_its_evaluation(gpu, tmp_path, cache):
    """Warm start, rollouts, critic, checks, the probes' generator, checkpoints and the final evaluation."""
    run = train(tmp_path / "run", cache, *DGPO, *BRIEF)
    assert run.summary["machine"]["device"] == "cuda"
    assert gpu.launches["aten::_fused_adamw_"]
    with patch.object(sys, "argv", ["evaluate", f"checkpoint={run.path}", f"hydra.run.dir={tmp_path / 'evaluated'}"]):
        evaluate.main()
    measured = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert measured["evaluation"]["checkpoint"] == run.summary["evaluation"]["dgpo"]


# --- rollouts --------------------------------------------------------------------------------------------------------


def make_rollout(device: str, **settings):
    player = make_player(
        make_policy("pieces", seed=4).to(device),
        make_tokenizer("pieces"),
        make_envs(4),
        RolloutConfig(max_new_tokens=16, max_tokens=300, **settings),
    )
    return [
        (turn.action_ids.tolist(), turn.action_logprobs.tolist())
        for episode in player.rollout(range(8), seed=(1,))[0]
        for turn in episode.turns
    ]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 5}])
def test_a_rollout_is_the_same_on_both(settings, gpu):
    assert make_rollout("cuda", **settings) == make_rollout("cpu", **settings)


# --- search ----------------------------------------------------------------------------------------------------------


def test_exact_search_is_the_same_on_both(gpu):
    draws = np.random.default_rng(0)
    vectors, queries = (draws.standard_normal((n, 16), dtype=np.float32) for n in (400, 7))
    here, there = (TorchSearch(vectors, device).propose(queries, 5) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(there.rows, here.rows)
    np.testing.assert_allclose(there.scores, here.scores, rtol=1e-6)
