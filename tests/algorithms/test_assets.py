"""The bundled models are what their card says, and the commands that make them work."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import DGPO_STEPS, KD_STEPS
from test_experiments import run_settings
from toy_policy import make_player
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from agentic_rag_env.actions import Answer, Search, parse_action
from agentic_rag_env.errors import DataError
from agentic_rag_env.prompts import MALFORMED_HINT, PROMPTS, format_passages, information_block
from agentic_rag_env.vector import AgenticRAGVectorEnv
from algorithms.assets import ASSETS, gguf, pretrain, traces
from algorithms.assets.tokenizer import EOS, build_tokenizer
from algorithms.learner.networks import load_model, load_tokenizer
from algorithms.rollout.config import RolloutConfig
from algorithms.training.build import Networks
from algorithms.training.model_names import resolve_model

MODELS = ("tiny-student", "tiny-teacher")


@pytest.fixture(scope="module")
def world():
    return traces.fresh_world(random.Random(0))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_them_like_any_other(name):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    assert isinstance(model, Qwen2ForCausalLM)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_they_are_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 16 * 2**20


def test_a_run_stands_for_its_newest_checkpoint(dgpo_run):
    newest = dgpo_run.path / "checkpoints" / f"{KD_STEPS + DGPO_STEPS:06d}"
    assert resolve_model(str(dgpo_run.path)) == str(newest)


def test_a_run_that_trains_on_stands_for_one_checkpoint_of_it(dgpo_run, tmp_path):
    """Tokenizer, weights, teacher and reference are of one checkpoint, also when the run that began with it goes on."""
    other = tmp_path / "other"
    shutil.copytree(dgpo_run.path, other)
    newest = other / "checkpoints" / f"{KD_STEPS + DGPO_STEPS:06d}"
    (tmp_path / "later").mkdir()
    later = newest.rename(tmp_path / "later" / newest.name)
    config = run_settings("algo=ppo", f"model.policy={other}", f"model.teacher={other}")
    (other / "summary.json").unlink()
    step = KD_STEPS + DGPO_STEPS - 2
    with pytest.warns(UserWarning, match=rf"policy=.* is not complete. This run reads .*{step:06d} to the end"):
        networks = Networks(config)
    before = {name: weight.clone() for name, weight in networks.policy.state_dict().items()}
    later.rename(newest)
    resumed = Networks(config, networks.model_steps)
    assert networks.model_steps == resumed.model_steps == {"policy": step, "teacher": step}
    for model in (networks.earlier_policy(None), networks.teacher(), resumed.policy):
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert Networks(config).place_of_policy == str(newest)
    shutil.rmtree(other / "checkpoints" / f"{step:06d}")
    with pytest.raises(DataError, match=f"began with the model .*{step:06d}, which can't be used: it is gone"):
        Networks(config, networks.model_steps)


def test_a_gguf_file_stands_for_its_folder_in_the_cache(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "convert", lambda path, folder: folder.mkdir(parents=True))
    folder = Path(resolve_model(str(file), tmp_path / "cache"))
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert folder.is_dir()


def test_what_is_neither_stays_as_it_is():
    assert resolve_model("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "temperature"),
    [("tiny-student", 0.0, 0.02, 0.0), ("tiny-student", 0.0, 0.02, 1.0), ("tiny-teacher", 0.9, 1.0, 0.0)],
)
def test_the_student_is_no_agent_and_the_teacher_is_one(name, lowest, highest, temperature):
    dataset = {"name": "tiny", "split": "test", "seed": 7}
    envs = AgenticRAGVectorEnv(100, dataset=dataset, autoreset_mode=AutoresetMode.DISABLED)
    model, tokenizer = load_model(ASSETS / name), load_tokenizer(ASSETS / name)
    player = make_player(model, tokenizer, envs, RolloutConfig(temperature=temperature, max_new_tokens=32))
    trajectories, _ = player.rollout(range(100), seed=(0,))
    assert lowest <= np.mean([trajectory.correct for trajectory in trajectories]) <= highest


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_comes_back(text):
    tokenizer = build_tokenizer()
    text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id not in ids


def test_words_and_tags_are_whole_tokens(world):
    tokenizer = build_tokenizer()
    block = information_block(format_passages(world.corpus[:3]))
    pieces = [tokenizer.decode([i]) for i in tokenizer(block)["input_ids"]]
    assert pieces[:2] == ["\n\n<information>", "Doc 1(Title:"]
    assert pieces[-1] == "</information>\n\n"
    assert {len(piece) for piece in pieces if len(piece.strip()) == 1} <= {1}
    assert {piece for piece in pieces if len(piece) == 1} <= {".", ")", "\n"}
    assert len(tokenizer(MALFORMED_HINT)["input_ids"]) == 1
    assert len(tokenizer("<think></think><search></search><answer></answer>")["input_ids"]) == 6


def test_scripted_traces_end_in_the_right_answer(world):
    documents = list(traces.search_traces(world, 200, np.random.default_rng(0), random.Random(0)))
    assert len(documents) > 190
    for document in documents:
        prompt, *rest = [text for text, _ in document]
        written = [text for text, weight in document if weight == 1.0]
        actions = [parse_action(text.removesuffix(EOS)) for text in written]
        assert prompt.endswith("?\n")
        assert all(isinstance(action, Search) for action in actions[:-1])
        assert isinstance(actions[-1], Answer)
        assert len(rest) == 2 * len(actions) - 1


def test_the_student_never_sees_a_question_before_an_action(world):
    draw = random.Random(0)
    seen = [
        "".join(text for text, _ in document)
        for maker in (traces.reading_exercises, traces.copying_exercises, traces.fragments)
        for document in maker(world, 300, draw)
    ]
    with_question = [text for text in seen if "?" in text]
    assert with_question
    for text in with_question:
        assert not any(tag in text for tag in ("<think>", "<search>", "<answer>"))
    assert "traces" not in pretrain.RECIPES["student"].shares
    assert PROMPTS["bare"].endswith("\n")


def test_orthogonalized_updates_have_singular_values_near_one():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(pretrain._orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_pretraining_learns_and_saves(tmp_path):
    recipe = pretrain.Recipe(32, 1, 60, {"traces": 50, "reading": 50}, seed=0)
    tokenizer = build_tokenizer()
    ids, weights = next(pretrain.batches(recipe, tokenizer))
    with torch.no_grad():
        before = pretrain.language_model_loss(pretrain.build_model(recipe, tokenizer), ids, weights)
    pretrain.pretrain(recipe, tmp_path)
    with torch.no_grad():
        after = pretrain.language_model_loss(AutoModelForCausalLM.from_pretrained(tmp_path), ids, weights)
    assert after < before - 0.4
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == EOS
