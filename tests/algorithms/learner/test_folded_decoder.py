"""The folded decoder gives what a plain pass gives, and stands back where it can't or would not pay."""

import pytest
import torch
from torch import nn
from toy_learner import make_decoder
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from algorithms.learner import folded_decoder
from algorithms.learner.folded_decoder import FoldedDecoder, can_fold
from algorithms.learner.networks import backbone_hidden, load_model
from algorithms.rollout.kv_cache import EpisodeCache

FAMILIES = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "llama": (LlamaForCausalLM, LlamaConfig)}
LENGTHS = torch.tensor([9, 4])


def in_steps(model, input_ids, at_once=9):
    """Hidden states of rows of 9 and 4 tokens and of two further ones, read through one cache."""
    cache = EpisodeCache(2)
    first = cache.forward(model.base_model, input_ids[:, :at_once], torch.arange(at_once).expand(2, -1), length=at_once)
    lengths, later = LENGTHS[:, None].clone(), []
    for _ in range(2):
        later.append(
            cache.forward(model.base_model, input_ids.gather(1, lengths), lengths, length=int(lengths.max()) + 1)
        )
        lengths += 1
    assert (cache._folded is not None) == can_fold(model.base_model)
    return first, torch.cat(later, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_it_gives_what_a_plain_pass_gives(family, tmp_path):
    make_decoder(*FAMILIES[family]).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float64")
    assert can_fold(model.base_model)
    input_ids = torch.arange(22).view(2, 11) * 7 % 50
    plain = model.base_model(input_ids=input_ids).last_hidden_state
    first, later = in_steps(model, input_ids)
    torch.testing.assert_close(first[0], plain[0, :9], rtol=0, atol=1e-10)
    torch.testing.assert_close(first[1, :4], plain[1, :4], rtol=0, atol=1e-10)
    torch.testing.assert_close(later[0], plain[0, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(later[1], plain[1, 4:6], rtol=0, atol=1e-10)


@torch.inference_mode()
def test_only_the_positions_that_are_asked_for():
    model = make_decoder(*FAMILIES["qwen2"])
    input_ids = torch.arange(12).view(2, 6)
    positions = torch.arange(6).expand(2, -1)
    at = torch.tensor([0, 1]), torch.tensor([5, 2])
    whole = EpisodeCache(2).forward(model.base_model, input_ids, positions, length=6)
    part = EpisodeCache(2).forward(model.base_model, input_ids, positions, length=6, at=at)
    torch.testing.assert_close(part, whole[at])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_plain_pass(family, tmp_path):
    make_decoder(*FAMILIES[family]).save_pretrained(tmp_path)
    ours, plain = (load_model(tmp_path, dtype="float64") for _ in range(2))
    assert can_fold(ours.base_model)
    input_ids, at = torch.arange(22).view(2, 11) * 7 % 50, (torch.tensor([0, 0, 1]), torch.tensor([10, 3, 8]))
    weights = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32)
    hidden = backbone_hidden(ours, input_ids, None, at)
    expected = plain.base_model(input_ids=input_ids).last_hidden_state[at]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
    (hidden * weights).sum().backward()
    (expected * weights).sum().backward()
    compared = 0
    for mine, other in zip(ours.base_model.parameters(), plain.base_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10)
        compared += 1
    assert compared > 20


def test_weights_are_copied():
    model = make_decoder(*FAMILIES["llama"])
    ids, positions, at = torch.arange(6)[None], torch.arange(6)[None], (torch.tensor([0]), torch.tensor([5]))
    with torch.no_grad():
        before = FoldedDecoder(model.base_model)
        model.base_model.layers[0].self_attn.q_proj.weight.mul_(2)
        read = [one.read(ids, positions, length=6, at=at) for one in (before, FoldedDecoder(model.base_model))]
    assert not torch.allclose(*read), "a cache lives as long as its weights"


def stand_back(change):
    model = make_decoder(*FAMILIES["qwen2"])
    change(model)
    return model.base_model


class Adapter(nn.Linear):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.base_model.layers[1].mlp, "up_proj", Adapter(32, 48, bias=False)),
        lambda model: setattr(model.base_model.rotary_emb, "rope_type", "dynamic"),
        lambda model: setattr(model.config, "hidden_act", "gelu"),
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
        lambda model: setattr(model.base_model.layers[0].mlp, "down_proj", nn.Linear(48, 32)),
    ],
    ids=["bfloat16", "adapter", "dynamic table", "gelu", "eager", "bias"],
)
def test_it_stands_back(change):
    assert not can_fold(stand_back(change))


def test_it_stands_back_from_norms_of_heads_and_from_large_models(monkeypatch):
    assert not can_fold(make_decoder(Qwen3ForCausalLM, Qwen3Config, head_dim=8).base_model)
    model = make_decoder(*FAMILIES["qwen2"]).base_model
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fold(model)
    monkeypatch.setattr(folded_decoder, "_MAX_PARAMETERS", 1000)
    assert not can_fold(model)
