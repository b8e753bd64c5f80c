"""Rollouts under bfloat16 read a copy of the linear layers that is equal, bit for bit, to what autocast would read."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from toy_learner import make_batch, make_model
from toy_policy import make_envs, make_policy, make_tokenizer

from agentic_rag_env.actions import CLOSING_TAGS
from algorithms.learner.collate import collate
from algorithms.learner.networks import backbone_hidden, lm_logits
from algorithms.learner.precision import autocast
from algorithms.learner.scoring import Scorer
from algorithms.rollout.bfloat16_copy import bfloat16_copy
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.player import Player


def logits(model, ids):
    with torch.no_grad(), autocast(ids.device, "bfloat16"):
        return lm_logits(model, backbone_hidden(model, ids, torch.ones_like(ids, dtype=torch.bool)), 23)


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def test_the_copy_computes_what_autocast_computes_and_follows_the_weights():
    model, ids = make_model(3), make_batch().input_ids
    held = bfloat16_copy(model)
    first = logits(model, ids)
    assert torch.equal(logits(held.model, ids), first)
    change(model)
    changed = logits(model, ids)
    assert not torch.equal(changed, first)
    assert not torch.equal(logits(held.model, ids), changed), "its linear layers are still those from before"
    places = [parameter.data_ptr() for parameter in held.model.parameters()]
    assert bfloat16_copy(model) is held
    assert torch.equal(logits(held.model, ids), changed)
    assert [parameter.data_ptr() for parameter in held.model.parameters()] == places


def test_only_linear_layers_are_copied_and_the_policy_stays_as_it_was():
    model = make_model(3)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    held = bfloat16_copy(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for name, parameter in held.model.named_parameters():
        is_linear = name.rpartition(".")[0] in names
        assert parameter.dtype == (torch.bfloat16 if is_linear else torch.float32), name
        assert (parameter.data_ptr() in own) != is_linear, name
    head, embedding = held.model.get_output_embeddings(), held.model.get_input_embeddings()
    assert (head.weight.dtype, embedding.weight.dtype) == (torch.bfloat16, torch.float32), "though they are tied"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def make_engine(model, precision="bfloat16"):
    config = RolloutConfig(max_new_tokens=16, max_tokens=300)
    return CachedEngine(
        model, make_tokenizer("whole"), config, num_rows=4, action_ends=CLOSING_TAGS, precision=precision
    )


def test_engines_share_a_copy_for_as_long_as_one_of_them_lives():
    model = make_policy("whole", seed=4)
    engines = [make_engine(model) for _ in range(2)]
    copied = weakref.ref(bfloat16_copy(model))
    assert {id(engine._copy) for engine in engines} == {id(copied())}
    assert all(engine.model is model for engine in engines)
    engines.clear()
    gc.collect()
    assert copied() is None
    assert make_engine(model, "float32")._copy is None


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_written_has_the_log_probabilities_of_the_learner(seed):
    model = make_policy("whole", seed=4)
    player = Player(make_engine(model), make_envs(4))
    for _ in range(2):
        player.engine.set_weights(model)
        trajectories, _ = player.rollout(range(8), seed=(seed,))
        batch = collate(trajectories, 0)
        scorer = Scorer(vocab_size=player.engine.vocab_size, precision="bfloat16")
        gap = (scorer.logprobs(model, batch) - batch.old_logprobs)[batch.response_mask].abs()
        assert gap.mean() < 5e-3
        assert gap.max() < 0.1
        with torch.no_grad():  # a step of training, after which the old copy would be far off
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter += 0.2 * torch.from_numpy(np.random.default_rng(0).standard_normal(parameter.shape))
