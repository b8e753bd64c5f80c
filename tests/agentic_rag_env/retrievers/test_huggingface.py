"""Encoders of Hugging Face transformers, as their folders, presets and settings say; against pooling by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agentic_rag_env  # noqa: F401
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever
from agentic_rag_env.retrievers.vectors import usage
from agentic_rag_env.retrievers.vectors.encoders import build_encoder
from agentic_rag_env.retrievers.vectors.huggingface import HuggingFaceEncoder
from agentic_rag_env.types import Passage

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]
E5 = {"query_prefix": "query: ", "passage_prefix": "passage: "}


@pytest.fixture(scope="module", params=["bert", "qwen2"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of two layers, with a tokenizer of whole words (BERT) or of bytes (Qwen2)."""
    torch = pytest.importorskip("torch")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if request.param == "bert":
        vocabulary = {word: index for index, word in enumerate(["[UNK]", "query", "passage", ":", *WORDS])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes))
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = transformers.Qwen2Tokenizer({byte: index for index, byte in enumerate(alphabet)}, [])
        model = transformers.Qwen2Model(
            transformers.Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
        )
    folder = str(tmp_path_factory.mktemp(request.param))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def by_hand(folder: str, text: str, pooling: str) -> np.ndarray:
    """The plain forward pass of one text alone, pooled; not scaled."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(**transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt"))[0][0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.max(0).values}
    return pooled[pooling].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_hugging_face_pooling(model_folder: str, pooling: str) -> None:
    """Batched and padded equals the plain forward pass of each text alone."""
    encoder = build_encoder({"model": model_folder, "pooling": pooling, "batch_size": 2, "device": "cpu", **E5})
    texts = ["amber", "birch cedar delta ember fjord", "unknown words here", "grove haven"]
    for prefix, rows in (("query: ", encoder.encode_queries(texts)), ("passage: ", encoder.encode_passages(texts))):
        assert rows.dtype == np.float32
        for text, row in zip(texts, rows, strict=True):
            np.testing.assert_allclose(row, unit(by_hand(model_folder, prefix + text, pooling)), atol=2e-6)


def test_hugging_face_in_half_precision(model_folder: str) -> None:
    texts = ["amber birch", "cedar"]
    exact, half = (
        build_encoder({"model": model_folder, "preset": "e5", "dtype": dtype, "device": "cpu"}).encode_passages(texts)
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert 1e-6 < np.abs(exact - half).max() < 0.05


def test_hugging_face_length_limit_and_hostile_texts(model_folder: str) -> None:
    encoder = build_encoder({"model": model_folder, "pooling": "mean", "max_length": 4, "device": "cpu"})
    long, short = encoder.encode_passages(["amber birch cedar delta " * 100, "amber birch cedar delta"])
    np.testing.assert_allclose(long, short, atol=1e-6)
    rows = encoder.encode_passages(["", "\ud800", "\x00", "x" * 100_000])
    assert rows.shape == (4, 16)
    # A text without a token has no features; among others it stays so.
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [0, 1, rows[2].any(), 1], atol=1e-6)


def test_hugging_face_in_dense_search(model_folder: str) -> None:
    rng = np.random.default_rng(0)
    corpus = [Passage(f"p{row}", " ".join(rng.choice(WORDS, rng.integers(1, 12)))) for row in range(60)]
    dense = DenseRetriever(DenseConfig({"model": model_folder, "pooling": "mean"}), corpus)
    texts = [corpus[row].contents for row in (5, 40, 17)]
    together = dense.search(texts, 3)
    assert [found[0].contents for found in together] == texts
    assert all(found[0].score == pytest.approx(1, abs=1e-3) for found in together)
    assert [[passage.id for passage in found] for found in together] == [
        [passage.id for passage in dense.search([text], 3)[0]] for text in texts
    ]
    assert isinstance(build_encoder({"model": model_folder, "preset": "gte"}), HuggingFaceEncoder)


@pytest.mark.parametrize(
    "setting",
    [
        {"pooling": "median"},
        {"preset": "e6"},
        {"dtype": "int8"},
        {"max_length": 0},
        {"batch_size": 0},
        {"poling": "mean"},
    ],
)
def test_hugging_face_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        build_encoder({"model": "some/model", **setting})


def test_hugging_face_length_beyond_the_model(model_folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"max_length=100000, but .* has \d+ positions"):
        build_encoder({"model": model_folder, "pooling": "mean", "max_length": 100_000})


@pytest.mark.parametrize("model_type", ["unheard_of", None])
def test_hugging_face_folder_with_code_of_its_own(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    """It is neither executed nor asked about, whether or not the library has its own code for such a model."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings_of = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(
        json.dumps({**settings_of, "auto_map": code, "model_type": model_type or settings_of["model_type"]})
    )
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is there to answer"))
    if model_type is None:
        build_encoder({"model": str(folder), "pooling": "mean", "device": "cpu"})
    else:
        with pytest.raises(ConfigurationError, match="cannot be loaded"):
            build_encoder({"model": str(folder), "device": "cpu"})
    assert not (tmp_path / "executed").exists()


def test_hugging_face_folder_that_holds_no_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigurationError, match="cannot be loaded; give a folder made by save_pretrained"):
        build_encoder(str(tmp_path))


def test_vectors_narrower_than_the_hidden_size(model_folder: str, tmp_path: Path) -> None:
    """OPT-350m projects its hidden states of 1024 numbers to 512."""
    import transformers

    folder = str(tmp_path / "opt")
    shutil.copytree(model_folder, folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    config = transformers.OPTConfig(vocab_size=300, word_embed_proj_dim=8, **sizes)
    transformers.OPTModel(config).save_pretrained(folder)
    rows = build_encoder({"model": folder, "pooling": "mean", "device": "cpu"}).encode_passages(["amber birch", ""])
    assert rows.shape == (2, 8)
    np.testing.assert_allclose(rows[0], unit(by_hand(folder, "amber birch", "mean")), atol=2e-6)


@pytest.mark.parametrize("kind", ["T5Model", "T5EncoderModel"])
def test_a_model_with_encoder_and_decoder(model_folder: str, tmp_path: Path, kind: str) -> None:
    import transformers

    folder = str(tmp_path / "t5")
    shutil.copytree(model_folder, folder)
    config = transformers.T5Config(vocab_size=300, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    getattr(transformers, kind)(config).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"is a T5Model, which gives no hidden .* such as E5 or BGE"):
        build_encoder({"model": folder, "pooling": "mean", "device": "cpu"})


def test_a_model_of_texts_and_images(model_folder: str, tmp_path: Path) -> None:
    import transformers

    folder = str(tmp_path / "clip")
    shutil.copytree(model_folder, folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(text_config={"vocab_size": 300, **sizes}, vision_config=sizes)
    transformers.CLIPModel(config).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"cannot be loaded; give a folder .*CLIPModel"):
        build_encoder({"model": folder, "pooling": "mean", "device": "cpu"})


# What a folder of sentence-transformers says

BERT, POOLING, FACTS = "sentence_bert_config.json", "1_Pooling/config.json", "config_sentence_transformers.json"
KINDS = "sentence_transformers.models"


def sentence_folder(model_folder: str, folder: Path, files: dict[str, Any], normalize: bool = True) -> str:
    """The model as sentence-transformers saves it, with some of the files changed; None leaves a file out."""
    shutil.copytree(model_folder, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    written = {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"{KINDS}.{kind}"}
            for place, (path, kind) in enumerate(modules)
        ],
        POOLING: {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        BERT: {"max_seq_length": 5, "do_lower_case": False},
        FACTS: {"prompts": {"query": "query : ", "document": "passage : "}, "similarity_fn_name": None},
        **files,
    }
    for name, content in written.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("pooling_file", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"embedding_dimension": 16, "pooling_mode": "max"}, "max"),
        ({"embedding_dimension": 16, "pooling_mode": ["lasttoken"]}, "last"),
    ],
)
def test_a_folder_is_used_as_it_says(model_folder: str, tmp_path: Path, pooling_file: Any, pooling: str) -> None:
    folder = sentence_folder(model_folder, tmp_path / "model", {POOLING: pooling_file, BERT: None})
    encoder = build_encoder(folder)
    for text in ("amber", "birch cedar delta ember fjord"):
        asked, kept = encoder.encode_queries([text])[0], encoder.encode_passages([text])[0]
        np.testing.assert_allclose(asked, unit(by_hand(folder, f"query : {text}", pooling)), atol=2e-6)
        np.testing.assert_allclose(kept, unit(by_hand(folder, f"passage : {text}", pooling)), atol=2e-6)
    assert encoder.settings() == {
        "name": "huggingface", "model": folder, "pooling": pooling, "query_prefix": "query : ",
        "passage_prefix": "passage : ", "max_length": 512 if "bert" in model_folder else encoder.usage.max_length,
    }  # fmt: skip


def test_a_folder_says_length_and_case(model_folder: str, tmp_path: Path) -> None:
    files = {BERT: {"max_seq_length": 5, "do_lower_case": True}, FACTS: None}
    encoder = build_encoder(sentence_folder(model_folder, tmp_path / "lower", files))
    exact = build_encoder(sentence_folder(model_folder, tmp_path / "exact", {FACTS: None}))
    assert (encoder.usage.max_length, encoder.usage.query_prefix) == (5, "")
    np.testing.assert_array_equal(encoder.encode_queries(["AMBER Birch"]), exact.encode_queries(["amber birch"]))
    assert encoder.fingerprint != exact.fingerprint
    long = build_encoder({"model": exact.config.model, "max_length": 7, "query_prefix": "haven "})
    assert (long.usage.max_length, long.usage.query_prefix) == (7, "haven ")


@pytest.mark.parametrize(("similarity", "scaled"), [("dot", False), ("cosine", True), (None, True)])
def test_passages_keep_their_lengths_where_the_inner_product_counts(
    model_folder: str, tmp_path: Path, similarity: str | None, scaled: bool
) -> None:
    files = {FACTS: {"similarity_fn_name": similarity}, BERT: None}
    folder = sentence_folder(model_folder, tmp_path / "model", files, normalize=False)
    encoder = build_encoder(folder)
    pooled = by_hand(folder, "amber birch", "cls")
    np.testing.assert_allclose(
        encoder.encode_passages(["amber birch"])[0], unit(pooled) if scaled else pooled, atol=3e-6
    )
    np.testing.assert_allclose(encoder.encode_queries(["amber birch"])[0], unit(pooled), atol=2e-6)
    assert encoder.settings().get("normalize", True) == scaled


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pooling": "mean"}, "pooling is named differently: 'mean' by the settings, 'cls' by the folder of"),
        ({"preset": "e5"}, "pooling is named differently: 'mean' by preset=e5, 'cls' by the folder of"),
        ({"preset": "bge"}, "query_prefix is named differently: 'Represent this .* by preset=bge, 'query : ' by the"),
        ({"normalize": False}, "normalize is named differently: False by the settings, True by the folder"),
    ],
)
def test_a_setting_that_contradicts_the_folder(
    model_folder: str, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = sentence_folder(model_folder, tmp_path / "model", {})
    with pytest.raises(ConfigurationError, match=said):
        build_encoder({"model": folder, **settings})


def test_a_setting_that_contradicts_the_preset(model_folder: str) -> None:
    with pytest.raises(ConfigurationError, match="'mean' by the settings, 'cls' by preset=bge"):
        build_encoder({"model": model_folder, "preset": "bge", "pooling": "mean"})


def test_a_folder_that_says_nothing(model_folder: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"does not say how .* Give preset=e5\|bge\|minilm\|gte or pooling=mean"
    ):
        build_encoder(model_folder)


@pytest.mark.parametrize(
    ("name", "pooling", "query", "passage"),
    [
        ("e5", "mean", "query: ", "passage: "),
        ("bge", "cls", "Represent this sentence for searching relevant passages: ", ""),
        ("minilm", "mean", "", ""),
        ("gte", "mean", "", ""),
    ],
)
def test_presets(model_folder: str, name: str, pooling: str, query: str, passage: str) -> None:
    encoder = build_encoder({"model": model_folder, "preset": name})
    for prefix, vector in ((query, encoder.encode_queries(["amber"])), (passage, encoder.encode_passages(["amber"]))):
        np.testing.assert_allclose(vector[0], unit(by_hand(model_folder, prefix + "amber", pooling)), atol=2e-6)


@pytest.mark.parametrize(
    ("hub_id", "prefix"),
    [
        ("intfloat/e5-base-v2", "query: "),
        ("intfloat/multilingual-e5-small", "query: "),
        ("BAAI/bge-large-en-v1.5", "Represent this sentence for searching relevant passages: "),
        ("sentence-transformers/all-MiniLM-L6-v2", ""),
        ("thenlper/gte-base", ""),
        ("intfloat/e5-mistral-7b-instruct", None),
        ("BAAI/bge-m3", None),
        ("somebody/e5-base-v2", None),
    ],
)
def test_a_well_known_hub_id_brings_its_preset(
    monkeypatch: pytest.MonkeyPatch, hub_id: str, prefix: str | None
) -> None:
    monkeypatch.setattr(usage, "_read", lambda model, name: None)
    if prefix is None:
        with pytest.raises(ConfigurationError, match="does not say how"):
            usage.resolve(hub_id, None, usage.Usage(), 512)
    else:
        assert usage.resolve(hub_id, None, usage.Usage(), 512).query_prefix == prefix


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules.json": "{"}, "modules.json cannot be read"),
        ({"modules.json": {"type": "Transformer"}}, "no list of modules"),
        ({"modules.json": [{"type": f"{KINDS}.CLIPModel"}]}, "its modules are CLIPModel; what can be computed is"),
        ({"modules.json": [{"path": "", "type": "a.Transformer"}, {"path": "../x", "type": "a.Pooling"}]}, "'../x'"),
        ({POOLING: None}, r"its pooling is \[\]"),
        ({POOLING: {"pooling_mode_weightedmean_tokens": True}}, "weightedmean"),
        ({POOLING: {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "one of mean, cls, last, max"),
        ({POOLING: {"pooling_mode": {"a": 1}}}, "its pooling is"),
        ({POOLING: {"pooling_mode_cls_token": True, "include_prompt": False}}, "without the tokens of its prompts"),
        ({BERT: {"max_seq_length": "many"}}, "max_seq_length is 'many'"),
        ({BERT: {"max_seq_length": 0}}, "max_seq_length is 0"),
        ({FACTS: {"similarity_fn_name": "manhattan"}}, "its similarity is 'manhattan'"),
        ({FACTS: {"prompts": ["query"]}}, "prompts are no mapping"),
        ({FACTS: []}, "is no mapping"),
    ],
)
def test_a_folder_that_asks_for_something_else(
    model_folder: str, tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    folder = sentence_folder(model_folder, tmp_path / "model", files)
    with pytest.raises(ConfigurationError, match=said):
        usage.resolve(folder, None, usage.Usage(), 512)


@pytest.mark.parametrize(
    ("place", "preset"),
    [
        ("e5-base-v2", "e5"),
        ("models/multilingual-e5-small", "e5"),
        ("bge-base-en-v1.5", "bge"),
        ("hub/models--intfloat--e5-base-v2/snapshots/abc", "e5"),
        ("e5-base-v2-tuned", None),
        ("e5-base-v2/checkpoint", None),
    ],
)
def test_a_local_copy_of_a_known_model_keeps_its_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, preset: str | None
) -> None:
    """Its folder says the pooling, as that of E5 and BGE does, and no prefix."""
    folder = tmp_path / place
    (folder / "1_Pooling").mkdir(parents=True)
    kinds = ["Transformer", "Pooling"]
    paths = ["", "1_Pooling"]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in zip(kinds, paths, strict=True)]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = usage.PRESETS[preset].pooling if preset else "mean"
    flag = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling or ""]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({flag: True}))
    found = usage.resolve(str(folder), None, usage.Usage(), 512)
    expected = usage.PRESETS[preset] if preset else usage.Usage(query_prefix="", passage_prefix="")
    assert (found.query_prefix, found.passage_prefix) == (expected.query_prefix, expected.passage_prefix)
    assert (f"so preset={preset} is taken" in capsys.readouterr().out) == (preset is not None)
    plain = usage.resolve(str(folder), None, usage.Usage(query_prefix="", passage_prefix=""), 512)
    assert (plain.query_prefix, plain.passage_prefix) == ("", "")
    assert not capsys.readouterr().out
