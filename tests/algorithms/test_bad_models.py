"""Model folders with a mistake in them: each is refused with a message that names it, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import TINY, command
from transformers import AutoTokenizer

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.types import Passage
from agentic_rag_env.weight_files import WEIGHT_INDEX
from algorithms.assets import ASSETS
from algorithms.learner.networks import load_model, load_tokenizer
from algorithms.rollout.tokenization import encode_prompts
from algorithms.training import checkpoint
from algorithms.training.trainer import Trainer


@pytest.fixture
def student(tmp_path):
    """A copy of the bundled student, to be damaged."""
    return Path(shutil.copytree(ASSETS / "tiny-student", tmp_path / "student"))


@pytest.fixture
def refused(tmp_path, cache):
    """What a run complains about before it trains, in one paragraph."""

    def call(*overrides: str) -> str:
        with patch.object(Trainer, "train", side_effect=AssertionError):
            run = command(*TINY, *overrides, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}")
        assert run.code == 1
        assert "Traceback" not in run.err
        assert 1 <= run.err.count("\n") <= 3, run.err
        return run.err

    return call


def add_token(folder: Path) -> int:
    """Add a token as people do, without a row for it; returns the rows that there are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PADDING]"})
    tokenizer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]


@pytest.mark.parametrize("role", ["policy", "teacher"])
def test_a_token_without_a_row_in_the_embedding(refused, student, role):
    rows = add_token(student)
    message = refused(f"model.{role}={student}")
    assert f"The tokenizer of '{student}' has ids up to {rows} ('[PADDING]')" in message
    assert f"its embedding has only {rows} rows. Call model.resize_token_embeddings(len(tokenizer))" in message


def model_with(folder: Path, source: str, tokens: list[str], rows: int = 768) -> Path:
    """A bundled model with further tokens and, as published models have, more rows than tokens."""
    model, tokenizer = load_model(ASSETS / source), AutoTokenizer.from_pretrained(ASSETS / source)
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FROM_EXPERT = {
    "kd": ["algo=kd", "algo.demonstrations.source=expert"],
    "dgpo": ["algo=dgpo", "algo.warm_start.demonstrations.source=expert"],
}


@pytest.mark.parametrize("algo", FROM_EXPERT)
@pytest.mark.parametrize(("owner", "other"), [("policy", "teacher"), ("teacher", "policy")])
def test_a_token_of_texts_that_the_other_model_does_not_know(refused, tmp_path, algo, owner, other):
    models = {"policy": "tiny-student", "teacher": "tiny-teacher"}
    tokens = {owner: ["<remark>"], other: []}
    given = [f"model.{role}={model_with(tmp_path / role, models[role], tokens[role])}" for role in models]
    message = refused(*FROM_EXPERT[algo], *given)
    size = len(AutoTokenizer.from_pretrained(ASSETS / "tiny-student"))
    assert f"The {other} has no '<remark>' (id {size} of model.{owner}; both have the ids below {size})" in message
    assert f"take it out of the tokenizer of model.{owner}" in message


def test_a_special_token_of_one_model_occurs_in_no_text_and_may_pad(tmp_path, cache):
    policy = model_with(tmp_path / "policy", "tiny-student", [], rows=760)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_special_tokens({"pad_token": "[PADDING]"})
    tokenizer.save_pretrained(policy)
    small = ["algo.batch_size=8", "algo.num_demonstrations=8", "algo.epochs=1", "evaluation.every=0"]
    places = [f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={cache}"]
    run = command(*TINY, "algo=kd", *small, f"model.policy={policy}", *places)
    assert run.code == 0, run.err


def test_a_teachers_short_context_is_noticed_before_it_is_only_scored_with(refused, tmp_path):
    folder = Path(shutil.copytree(ASSETS / "tiny-teacher", tmp_path / "teacher"))
    settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(settings))
    message = refused(*FROM_EXPERT["kd"], f"model.teacher={folder}")
    assert f"max_tokens is 512, but model.teacher={folder}'s max_position_embeddings is 256" in message


def test_a_token_without_a_row_in_an_encoder(student):
    rows = add_token(student)
    spec = {"name": "dense", "encoder": {"name": "huggingface", "model": str(student)}}
    with pytest.raises(
        ConfigurationError, match=rf"has ids up to {rows} \('\[PADDING\]'\), but its embedding has only"
    ):
        RETRIEVERS.build(spec, corpus=[Passage("p", "x")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{% for m in messages %}", "TemplateSyntaxError: "),
        ("{{ messages[3].content }}", "UndefinedError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
    ],
)
def test_a_chat_template_that_cannot_be_rendered(refused, student, template, reason):
    (student / "chat_template.jinja").write_text(template)
    message = refused(f"model.policy={student}")
    assert f"The chat template of '{student}' can't render a user's message ({reason}" in message
    assert "Mend chat_template in that folder, or remove it there" in message
    with pytest.raises(ConfigurationError, match=r"can't render"):
        encode_prompts(load_tokenizer(student), ["Who?"])


def test_weights_as_a_pickle_are_never_read(refused, student):
    torch.save(load_file(student / "model.safetensors"), student / "pytorch_model.bin")
    (student / "model.safetensors").unlink()
    message = refused(f"model.policy={student}")
    assert f"'{student}' holds its weights as a pickle only (pytorch_model.bin)" in message
    assert "is never read" in message


def test_code_that_a_model_brings_is_never_run(refused, student, tmp_path):
    config = json.loads((student / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (student / "config.json").write_text(json.dumps(config))
    (student / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    message = refused(f"model.policy={student}")
    assert f"Cannot load '{student}'" in message
    assert not (tmp_path / "ran").exists()


def lead_to(student: Path, name: str) -> Path:
    """Put the weights of the student elsewhere, and let its index name the place."""
    weights = load_file(student / "model.safetensors")
    (student / "model.safetensors").rename(student / "other.safetensors")
    place = student / name
    place.parent.mkdir(exist_ok=True)
    (torch.save if name.endswith(".bin") else save_file)(weights, place)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (student / WEIGHT_INDEX).write_text(json.dumps(index))
    return place


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "deeper/weights.safetensors", "weights.bin", "/absolute"])
def test_an_index_that_names_weights_elsewhere_or_a_pickle(student, tmp_path, name):
    if name == "/absolute":
        name = str(tmp_path / "elsewhere.safetensors")
    lead_to(student, name)
    said = f"{WEIGHT_INDEX} of '{student}' names {name!r}, which is no safetensors file beside it"
    assert_refused_wherever_models_are_read(student, said)


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors", "other.safetensors.index.json"])
def test_a_configuration_that_names_the_file_of_its_weights(student, name):
    torch.save(load_file(student / "model.safetensors"), student / "adapter_model.bin")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    assert_refused_wherever_models_are_read(
        student, f"names a file of its own for the weights (transformers_weights={name!r})"
    )


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"weight_map": {}}', '{"weight_map": [], "metadata": {}}']
)
def test_an_index_that_is_damaged(student, content):
    (student / WEIGHT_INDEX).write_text(content)
    assert_refused_wherever_models_are_read(student, f"{WEIGHT_INDEX} of '{student}' is damaged")


def test_an_encoder_that_is_an_adapter_of_a_model_elsewhere(student, tmp_path):
    base = shutil.copytree(student, tmp_path / "base")
    (student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (student / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"holds an adapter \(adapter_config\.json\), and a whole model is"):
        encode(student)


def encode(folder: Path) -> None:
    spec = {"name": "dense", "encoder": {"name": "huggingface", "model": str(folder), "pooling": "mean"}}
    RETRIEVERS.build(spec, corpus=[Passage("p", "x")])


def assert_refused_wherever_models_are_read(folder: Path, said: str) -> None:
    """As a policy or teacher, as an encoder, and as a checkpoint whose manifest is in order."""
    policy = load_model(ASSETS / "tiny-student")
    saved = checkpoint.save(folder.parent, 1, policy=policy, tokenizer=load_tokenizer(ASSETS / "tiny-student"),
                            learner_state={}, trainer_state={})  # fmt: skip
    state = (saved / checkpoint.TRAINING_STATE).read_bytes()
    shutil.rmtree(saved)
    shutil.copytree(folder, saved)
    (saved / checkpoint.TRAINING_STATE).write_bytes(state)
    checkpoint._write_manifest(saved, 1)
    for read in (load_model, encode):
        with pytest.raises(ConfigurationError) as error:
            read(folder)
        assert said in str(error.value)
    with pytest.raises(DataError) as refusal:
        checkpoint.load(saved, policy=policy)
    assert said.replace(str(folder), str(saved)) in str(refusal.value)
