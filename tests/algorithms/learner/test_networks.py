"""Loading, shared vocabularies, hidden states, logits and the critic, on tiny models written to disk."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from toy_policy import make_policy, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from agentic_rag_env.errors import ConfigurationError
from algorithms.assets import ASSETS
from algorithms.learner import folded_decoder
from algorithms.learner.networks import (
    Critic,
    backbone_hidden,
    check_lm_head,
    freeze,
    lm_logits,
    load_model,
    load_tokenizer,
    logit_width,
    pad_id,
    shared_vocab_size,
    soften,
)
from algorithms.learner.precision import decided_precision


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer("whole").save_pretrained(tmp_path)
    return tmp_path


def test_load_from_a_folder(folder):
    model, tokenizer = load_model(folder), load_tokenizer(str(folder))
    assert not model.training
    assert model.dtype == torch.float32
    assert logit_width(model) == 280
    assert load_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert tokenizer.get_vocab() == make_tokenizer("whole").get_vocab()
    text = " ada who?\n<search> rome</search>\n\nçé"
    assert tokenizer.encode(text) == make_tokenizer("whole").encode(text)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"config\.json is missing \(found: nothing\).*save_pretrained"):
        load_model(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"found: summary\.json"):
        load_model(tmp_path)
    with pytest.raises(ConfigurationError, match="There is no folder"):
        load_model(tmp_path / "nowhere")


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"Cannot load .*incomplete.*safetensors"):
        load_model(folder)


def test_a_folder_without_a_tokenizer_says_which_files_are_missing(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer: none of tokenizer\.json.*Copy these files"):
        load_tokenizer(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unreachable_hub_id_says_what_to_do(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"'nobody/nothing'.*neither a folder here nor reachable.*hf download"):
        load("nobody/nothing")


def with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    backend = make_tokenizer("whole").backend_tokenizer
    backend = backend.from_str(backend.to_str())
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_shared_vocabulary_of_one_family_is_the_narrower_logits():
    """As Qwen2.5: 0.5B has 151936 logits and 7B has 152064, for the same tokens."""
    tokenizer = make_tokenizer("whole")
    size = len(tokenizer)
    assert shared_vocab_size(tokenizer, copy.deepcopy(tokenizer), size + 13, size + 5) == size + 5
    assert shared_vocab_size(tokenizer, tokenizer, size + 13) == size + 13


def test_tokens_that_only_one_has_are_left_out():
    tokenizer = make_tokenizer("whole")
    size = len(tokenizer)
    assert shared_vocab_size(tokenizer, with_tokens("<tool>"), size + 64, size + 64) == size


def test_different_vocabularies_show_sizes_the_first_difference_and_ways_out():
    one, other = with_tokens("<a>", "<b>"), with_tokens("<a>", "<c>", "<d>")
    size = len(make_tokenizer("whole"))
    with pytest.raises(ConfigurationError) as caught:
        shared_vocab_size(one, other, 512, 640)
    for part in (f"({size + 2} and {size + 3} ids", "512 and 640", f"id {size + 1} on", "'<b>'", "'<c>'", "one family"):
        assert part in str(caught.value)


def test_filler_is_the_pad_token_or_end_of_text():
    tokenizer = copy.deepcopy(make_tokenizer("whole"))
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "?"
    assert pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("?") != tokenizer.eos_token_id


def test_hidden_states_and_logits_are_the_models_own_wherever_the_padding_is():
    model = make_policy("whole")
    ids = torch.randint(logit_width(model), (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        for left, right in ((0, 0), (0, 4), (3, 0), (2, 2)):
            mask = torch.tensor([[False] * left + [True] * 9 + [False] * right])
            padded = torch.full(mask.shape, 5)
            padded[mask] = ids[0]
            logits = lm_logits(model, backbone_hidden(model, padded, mask)[mask], logit_width(model))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("folded", [False, True])
def test_attention_over_a_batch_padded_on_the_right_is_causal_without_a_mask(monkeypatch, folded):
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **settings):
        calls.append(settings)
        return attention(*args, **settings)

    monkeypatch.setattr(folded_decoder if folded else torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(folded_decoder, "_MAX_PARAMETERS", 5_000_000 if folded else 0)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    backbone_hidden(make_policy("whole"), torch.full(mask.shape, 5), mask)
    assert calls
    assert all(settings["attn_mask"] is None and settings["is_causal"] for settings in calls)


def test_logits_are_cut_before_anything_else_and_float32():
    model = make_policy("whole").bfloat16()
    hidden = torch.randn(4, 32, dtype=torch.bfloat16)
    logits = lm_logits(model, hidden, 10)
    assert (logits.shape, logits.dtype) == ((4, 10), torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[10:] = 1e4
    torch.testing.assert_close(lm_logits(model, hidden, 10).softmax(-1), logits.softmax(-1), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("setting", "amx", "num_parameters", "decided", "why"),
    [
        ("auto", True, 135_000_000, "bfloat16", "auto: this processor has matrix units for it (AMX)"),
        ("auto", True, 200_000, "float32", "auto: bfloat16 pays from 10,000,000 parameters on"),
        ("auto", False, 135_000_000, "float32", "auto: this processor has no matrix units for bfloat16 (AMX)"),
        ("float32", True, 135_000_000, "float32", "learner.precision=float32"),
        ("bfloat16", False, 200_000, "bfloat16", "learner.precision=bfloat16"),
    ],
)
def test_what_precision_a_machine_computes_in_and_why(monkeypatch, setting, amx, num_parameters, decided, why):
    model = make_policy("whole")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(model, "num_parameters", lambda: num_parameters)
    assert decided_precision(setting, model) == (decided, why)


def test_families_that_cap_or_scale_logits_are_refused_by_name():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    for family, settings in (
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": None}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.06}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **settings)).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_()
        with pytest.raises(ConfigurationError, match=f"'{family}'.*not supported"):
            check_lm_head(model)
    check_lm_head(make_policy("whole"))
    check_lm_head(make_policy("whole").bfloat16())


@pytest.mark.parametrize("tied", [True, False])
def test_a_softened_model_has_its_logits_divided_and_nothing_else_changed(folder, tied):
    model = load_model(folder)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    ids = torch.arange(6)[None]
    embedding, logits = model.get_input_embeddings().weight.clone(), model(ids).logits
    softened = soften(model, 2.0)
    torch.testing.assert_close(softened(ids).logits, logits / 2)
    assert torch.equal(softened.get_input_embeddings().weight, embedding)
    check_lm_head(softened)


def test_a_softened_bias_of_the_head_is_divided_too():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        model.lm_head.bias.normal_()
        logits = model(ids).logits
        torch.testing.assert_close(soften(model, 2.0)(ids).logits, logits / 2)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def saved(folder, family: str, **settings):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **settings)).save_pretrained(folder)
    return folder


def change(folder, weights=None, **settings) -> None:
    """Change config.json of a model's folder, and its weights by a function."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if weights is not None:
        tensors = load_file(folder / "model.safetensors")
        save_file(weights(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_layers_that_config_json_does_not_count_are_not_dropped(tmp_path, prefix):
    change(
        saved(tmp_path, "llama", tie_word_embeddings=True),
        lambda tensors: {name.replace("model.", prefix): each for name, each in tensors.items()},
        num_hidden_layers=1,
    )
    with pytest.raises(ConfigurationError, match=r"9 of them .*have no place, among them (model\.)?layers\.1\."):
        load_model(tmp_path)


def test_biases_that_the_family_has_not_are_not_dropped(tmp_path):
    change(saved(tmp_path, "qwen2"), model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigurationError, match=r"6 of them .*self_attn\.k_proj\.bias\. Copy config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",  # a buffer in older files
        "model.layers.0.self_attn.masked_bias",  # a number in older files of GPT-2
        "lm_head.weight",  # tied, and saved all the same
        "v_head.summary.weight",  # of a critic
        "score.weight",  # of a classifier
    ],
)
def test_what_is_no_part_of_a_language_model_may_lie_beside_it(tmp_path, name):
    saved(tmp_path, "llama", tie_word_embeddings=True)
    expected = load_model(tmp_path)
    change(tmp_path, lambda tensors: {**tensors, name: tensors["model.embed_tokens.weight"].clone()})
    ids = torch.arange(6)[None]
    assert torch.equal(load_model(tmp_path)(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "granite"])
def test_norms_in_float64_follow_their_formula(tmp_path, family):
    norm = load_model(saved(tmp_path, family), dtype="float64").model.norm
    with torch.no_grad():
        norm.weight.uniform_()
        x = torch.randn(5, 16, dtype=torch.float64)
        expected = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)


def test_a_family_whose_norms_have_another_formula_is_refused_in_float64(tmp_path):
    """Gemma's weigh by 1 + weight."""
    load_model(saved(tmp_path, "gemma"))
    with pytest.raises(ConfigurationError, match=r"'gemma' .*float64: their GemmaRMSNorm.*learner\.precision=float32"):
        load_model(tmp_path, dtype="float64")


def test_freeze():
    model = make_policy("whole").train()
    assert freeze(model) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def critic_inputs():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return ids, mask, torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1])


@pytest.mark.parametrize("shared", [False, True])
def test_values_start_at_zero_and_read_the_named_positions(shared):
    model = make_policy("whole")
    critic = Critic(model, shared=shared)
    ids, mask, rows, columns = critic_inputs()
    assert critic.values(ids, mask, rows, columns).tolist() == [0.0, 0.0, 0.0]
    with torch.no_grad():
        critic.head.weight.normal_()
        critic.head.bias.fill_(0.5)
        hidden = model.model(input_ids=ids).last_hidden_state
        expected = hidden[rows, columns] @ critic.head.weight[0] + 0.5
    torch.testing.assert_close(critic.values(ids, mask, rows, columns), expected, atol=1e-5, rtol=0)


def test_a_separate_critic_learns_without_touching_the_policy():
    model = make_policy("whole")
    critic = Critic(freeze(model))
    with torch.no_grad():
        critic.head.weight.normal_()
    critic.values(*critic_inputs()).sum().backward()
    own, policy = dict(critic.named_parameters()), list(model.parameters())
    assert {"head.weight", "head.bias", "backbone.norm.weight"} <= set(own)
    assert own["backbone.layers.0.mlp.up_proj.weight"].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in policy)
    assert not {id(parameter) for parameter in own.values()} & {id(parameter) for parameter in policy}


def test_a_shared_critic_owns_a_head_only_and_trains_the_policys_trunk():
    model = make_policy("whole")
    critic = Critic(model, shared=True)
    assert set(dict(critic.named_parameters())) == set(critic.state_dict()) == {"head.weight", "head.bias"}
    with torch.no_grad():
        critic.head.weight.normal_()
    critic.values(*critic_inputs()).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["tiny-teacher", "tiny-student"])
def test_the_bundled_models_load_in_the_precision_of_a_gpu(name):
    """Their logits reach 10, where bfloat16 has steps of 0.06."""
    assert load_model(ASSETS / name, dtype=torch.bfloat16).dtype == torch.bfloat16
