"""Model folders with a mistake in them: each is refused with a message that names it, before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from small_runs import TINY, command
from transformers import AutoTokenizer

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.types import Passage
from algorithms.assets import ASSETS
from algorithms.learner.networks import load_tokenizer
from algorithms.rollout.tokenization import encode_prompts
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
