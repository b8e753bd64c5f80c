"""How many logits exist at once, and that the size of a block changes nothing. Sizes are counted, not measured."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_learner import VOCAB, make_batch, make_learner, sgd_free

from algorithms.dgpo import DGPO, DGPOConfig
from algorithms.distillm import DistiLLM, DistiLLMConfig
from algorithms.gkd import GKD, GKDConfig
from algorithms.grpo import GRPO, GRPOConfig
from algorithms.kd import KD, KDConfig
from algorithms.learner import scoring
from algorithms.ppo import PPO, PPOConfig
from algorithms.sft import SFT, SFTConfig
from algorithms.taid import TAID, TAIDConfig

CHUNK = 24
#: The hidden size, which is the number of rows of the head's gradient as it comes from the product.
HIDDEN = 16


class LiveLogits(TorchDispatchMode):
    """Counts the elements of all tensors [n, VOCAB] that exist at once, those of the head's gradient excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCAB and len(tensor) != HIDDEN:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes() // tensor.element_size()
            weakref.finalize(storage, self._live.pop, key)
        self.most = max(self.most, sum(self._live.values()))


LOSSES = {
    "sft": lambda: SFT(SFTConfig(optimizer=sgd_free())),
    "kd": lambda: KD(KDConfig(optimizer=sgd_free(), temperature=2.0)),
    "gkd": lambda: GKD(GKDConfig(optimizer=sgd_free(), jsd_beta=0.3)),
    "distillm, forward": lambda: DistiLLM(DistiLLMConfig(optimizer=sgd_free(), divergence="skew_forward")),
    "distillm, reverse": lambda: DistiLLM(DistiLLMConfig(optimizer=sgd_free(), divergence="skew_reverse")),
    "taid": lambda: TAID(TAIDConfig(optimizer=sgd_free())),
    "ppo": lambda: PPO(PPOConfig(num_minibatches=1, critic_warmup_steps=0, entropy_coef=0.1, optimizer=sgd_free())),
    "grpo": lambda: GRPO(GRPOConfig(num_minibatches=1, optimizer=sgd_free())),
    "dgpo, exact": lambda: DGPO(DGPOConfig(num_minibatches=1, critic_warmup_steps=0, kl_estimator="exact")),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks are an eighth of a chunk also where the vocabulary is small."""
    monkeypatch.setattr(scoring, "_MIN_BLOCK_LOGITS", 1)


def update(name: str, shared: bool = False) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a step, and the gradients that the policy's optimizer saw."""
    learner, batch = make_learner(LOSSES[name](), shared=shared, chunk_tokens=CHUNK), make_batch()
    batch.group_ids //= 2
    gradients: dict[str, Tensor] = {}
    learner.policy_optimizer.adamw.register_step_pre_hook(
        lambda *_: gradients.update({each: weight.grad.clone() for each, weight in learner.policy.named_parameters()})
    )
    learner.score(batch)
    return learner.update(batch, np.random.default_rng(0)), gradients


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_makes_more_than_four_chunks_of_logits_at_once(name, small_blocks):
    with LiveLogits() as live:
        update(name)
    assert CHUNK * VOCAB <= live.most <= 4 * CHUNK * VOCAB


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_change_nothing(name, shared, monkeypatch):
    if shared and name not in ("ppo", "dgpo, exact"):
        pytest.skip("has no critic")
    monkeypatch.setattr(scoring, "_MIN_BLOCK_LOGITS", 10**9)
    figures, gradients = update(name, shared)
    monkeypatch.setattr(scoring, "_MIN_BLOCK_LOGITS", 1)
    in_blocks, gradients_in_blocks = update(name, shared)
    assert in_blocks == pytest.approx(figures, rel=1e-5, abs=1e-6)
    assert gradients
    for each, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_blocks[each], gradient, rtol=1e-5, atol=1e-6, msg=each)


@pytest.mark.parametrize(
    ("vocab_size", "chunk_tokens", "expected"),
    [(151_936, 52, 6), (32_000, 250, 31), (749, 1024, 1335), (151_936, 1024, 128), (10**7, 1, 1)],
)
def test_a_block_is_an_eighth_of_a_chunk_unless_that_is_small(vocab_size, chunk_tokens, expected):
    assert scoring.Scorer(vocab_size=vocab_size, chunk_tokens=chunk_tokens).block_tokens == expected
