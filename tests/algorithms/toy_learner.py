"""A random little network, a batch made by hand, and a learner for them."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from algorithms.learner.algorithm import OptimizerConfig
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import Critic, freeze
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch

VOCAB = 23


def make_model(seed: int, vocab_size: int = VOCAB) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).eval()


def make_decoder(model_type, config_type, **settings):
    """A small model of a family, whose norms and biases are not the ones and zeros that would hide a forgotten one."""
    torch.manual_seed(0)
    config = config_type(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **settings,
    )
    model = model_type(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_batch(seed: int = 0, num_rows: int = 6, extra_padding: int = 0) -> Batch:
    """Prompt of 3, then turns of model text and observations; row 1 is short, the last row ends in an observation."""
    generator = torch.Generator().manual_seed(seed)
    length = 18
    ids = torch.randint(VOCAB, (num_rows, length), generator=generator)
    attention = torch.ones(num_rows, length, dtype=torch.bool)
    response = torch.zeros(num_rows, length, dtype=torch.bool)
    response[:, 3:7] = True
    response[:, 10:15] = True
    response[::2, 15:18] = True
    attention[1, 6:], response[1, 6:] = False, False
    if num_rows > 4:
        attention[4, 12:], response[4, 12:] = False, False
    ids[~attention] = 0
    old = torch.where(response, -torch.rand(num_rows, length, generator=generator) * 3, 0.0)
    pad = (0, extra_padding)
    correct = torch.arange(num_rows) % 2 == 0
    return Batch(
        input_ids=torch.nn.functional.pad(ids, pad),
        attention_mask=torch.nn.functional.pad(attention, pad),
        response_mask=torch.nn.functional.pad(response, pad),
        old_logprobs=torch.nn.functional.pad(old, pad),
        rewards=correct.float(),
        correct=correct,
        group_ids=torch.arange(num_rows),
    )


def sgd_free(learning_rate: float = 1e-3, **settings) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, max_grad_norm=1e9, **settings)


def make_learner(
    algorithm, seed: int = 0, policy=None, shared: bool = False, temperature: float = 1.0, device="cpu", **settings
):
    policy = (policy or make_model(seed)).to(device)
    needs = algorithm.needs
    return Learner(
        algorithm,
        policy,
        critic=Critic(policy, shared=shared) if "values" in needs else None,
        reference=freeze(make_model(100).to(device)) if "ref_logprobs" in needs else None,
        teacher=freeze(make_model(200).to(device)) if any(need.startswith("teacher") for need in needs) else None,
        config=LearnerConfig(**settings),
        total_steps=10,
        vocab_size=VOCAB,
        temperature=temperature,
    )
