"""The short forward pass gives what the families' own one gives, and stands back where it can't."""

import pytest
import torch
from torch import nn
from toy_learner import make_decoder
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from algorithms.learner import decoder
from algorithms.learner.networks import backbone_hidden, load_model

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


def make(family: str, **settings):
    model_type, config_type, own = FAMILIES[family]
    return make_decoder(model_type, config_type, **{**own, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_the_familys_own_pass(family):
    model = make(family)
    ids = torch.randint(50, (3, 21), generator=torch.Generator().manual_seed(1))
    at = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3, 20, 0, 7, 8])
    assert decoder.is_readable(model.base_model)
    positions = torch.arange(21)[None]
    expected = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(decoder.read(model.base_model, ids, positions), expected, atol=2e-6, rtol=1e-6)
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for hidden in (expected[at], backbone_hidden(model, ids, torch.ones_like(ids, dtype=torch.bool), at)):
        torch.testing.assert_close(hidden, expected[at], atol=2e-6, rtol=1e-6)
        model.zero_grad()
        (hidden * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        rounding = max(1e-5, 2e-6 * float(gradient.abs().max()))
        torch.testing.assert_close(gradients[1][name], gradient, atol=rounding, rtol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rows_have_in_common_is_read_once(family):
    model = make(family)
    ids = torch.randint(50, (3, 90), generator=torch.Generator().manual_seed(1))
    ids[:, :70] = ids[0, :70]
    at = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([70, 89, 75, 71, 80])
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[at]
    num_read, gradients = [], []
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: num_read.append(out[..., 0].numel()))
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for hidden in (expected, backbone_hidden(model, ids, None, at, num_shared=70)):
        torch.testing.assert_close(hidden, expected, atol=2e-6, rtol=1e-6)
        model.zero_grad()
        (hidden * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert num_read == [70 + 3 * 20]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        rounding = max(1e-5, 2e-6 * float(gradient.abs().max()))
        torch.testing.assert_close(gradients[1][name], gradient, atol=rounding, rtol=1e-5, msg=name)


def test_little_in_common_or_a_single_row_is_read_in_one_pass():
    cpu = torch.device("cpu")
    assert decoder.pays_to_share(2, 64, cpu)
    assert not decoder.pays_to_share(96, 63, cpu)
    assert not decoder.pays_to_share(1, 500, cpu)
    assert not decoder.pays_to_share(96, 500, torch.device("cuda"))


def test_float64_stays_exact(tmp_path):
    make("qwen2").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float64")
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    states = backbone_hidden(model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert decoder.is_readable(model.base_model)
    torch.testing.assert_close(states, expected, atol=1e-12, rtol=1e-12)


def test_what_stands_in_the_place_of_a_projection_is_called():
    model = make("qwen2")
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool)
    before = backbone_hidden(model, ids, mask)
    for layer in model.model.layers:
        for module, name in ((layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
            old = getattr(module, name)
            setattr(module, name, nn.Sequential(old, nn.Dropout(0.0), _Doubled()))
    after = backbone_hidden(model, ids, mask)
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, expected, atol=2e-6, rtol=1e-6)


class _Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_another_use_or_another_family_is_left_to_itself():
    assert not decoder.is_readable(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=9)).base_model)
    assert not decoder.is_readable(make("mistral", sliding_window=8).base_model)
    assert not decoder.is_readable(make("qwen2", attn_implementation="eager").base_model)
    with_dropout = make("qwen2", attention_dropout=0.1).base_model
    assert decoder.is_readable(with_dropout)
    assert not decoder.is_readable(with_dropout.train())
    checkpointed = make("qwen2")
    checkpointed.gradient_checkpointing_enable()
    assert not decoder.is_readable(checkpointed.base_model)
