"""Exporting an agent: a plain folder of transformers that still knows how it is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from small_runs import DGPO_STEPS, KD_STEPS
from transformers import AutoModelForCausalLM, AutoTokenizer

from algorithms import evaluate, export, merge
from algorithms.training.agent_files import AGENT_FILE, shareable
from algorithms.training.run_files import read_summary

LAST = f"{KD_STEPS + DGPO_STEPS:06d}"


@pytest.fixture(scope="module")
def exported(dgpo_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "my agent"
    export.main([str(dgpo_run.path), "--out", str(out)])
    return out


def test_transformers_alone_reads_the_weights_and_the_tokenizer(exported, dgpo_run):
    model = AutoModelForCausalLM.from_pretrained(exported)
    saved = dgpo_run.weights(KD_STEPS + DGPO_STEPS)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    text = "<search>a</search>"
    trained = AutoTokenizer.from_pretrained(dgpo_run.path / "checkpoints" / LAST)
    assert AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == trained(text)["input_ids"]
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", AGENT_FILE, "README.md"} <= names
    assert not names & {"training_state.pt", "manifest.json"}


def test_it_scores_by_its_path_alone_as_the_run_did(exported, dgpo_run, tmp_path):
    arguments = ["evaluate", f"checkpoint='{exported}'", "threads=1", "probes=[]", f"hydra.run.dir={tmp_path / 'out'}"]
    with patch.object(sys, "argv", arguments):
        evaluate.main()
    summary = read_summary(tmp_path / "out")
    assert summary["evaluation"] == {"checkpoint": dgpo_run.summary["evaluation"]["dgpo"]}


def test_the_card_says_where_it_comes_from_how_it_is_asked_and_what_it_reached(exported, dgpo_run):
    card = (exported / "README.md").read_text()
    figures = dgpo_run.summary["evaluation"]["dgpo"]["greedy"]["all"]
    low, high = figures["exact_match_interval"]
    for said in (
        "Trained with `dgpo` from `tiny-student`",
        "Data: `tiny`. Passages from: `bm25`.",
        "    {question}\n",
        "An action ends with `</search>` or `</answer>`.",
        "It may have 24 tokens, and an episode 512.",
        f"| `greedy` | `all` | 32 | {figures['exact_match']:.3f} ({low:.3f} to {high:.3f}) |",
        "python -m algorithms.run ",
        "algo.warm_start.num_demonstrations=24",
        "python -m algorithms.ask checkpoint='my agent'",
    ):
        assert said in card, said
    assert "base_model" not in card, "a bundled model is on no hub"


def test_a_checkpoint_that_was_not_measured_says_so(dgpo_run, tmp_path):
    step = next(
        path for path in sorted((dgpo_run.path / "checkpoints").iterdir())
        if path.name not in (LAST, f"{KD_STEPS:06d}")
    )  # fmt: skip
    export.main([str(step), "--out", str(tmp_path / "out")])
    assert "was not measured by its run" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("command", "next_one"), [(export, "ask"), (merge, "evaluate")])
def test_the_printed_command_holds_where_a_path_has_a_blank(command, next_one, monkeypatch, capsys):
    monkeypatch.setattr(command, command.__name__.rpartition(".")[2], lambda *given: None)
    command.main(["runs/x", "--out", "my agent"])
    assert capsys.readouterr().out.endswith(f": python -m algorithms.{next_one} checkpoint='my agent'\n")


def test_what_could_be_a_path_of_this_machine_stays_here(tmp_path):
    content = {
        "format": 1, "env": {"name": "agentic_rag", "prompt": "bare"}, "action_ends": ["</a>"],
        "rollout": {}, "precision": "float32", "vocab_size": 9,
        "measured": {"dataset": {"name": "jsonl", "questions": "/somewhere/q.jsonl", "split": "all"}},
    }  # fmt: skip
    (tmp_path / AGENT_FILE).write_text(json.dumps(content))
    assert shareable(tmp_path)["measured"] == {"dataset": {"name": "jsonl", "split": "all"}}


@pytest.mark.parametrize(
    ("run", "out", "said"),
    [
        ("tiny-student", "new", "comes from no run and has no agent.json"),
        ("{run}", "full", "holds something already"),
        ("{run}/nothing", "new", "comes from no run"),
    ],
)
def test_what_cannot_be_exported_is_a_clear_error(run, out, said, dgpo_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("as it was")
    with pytest.raises(SystemExit):
        export.main([run.replace("{run}", str(dgpo_run.path)), "--out", str(tmp_path / out)])
    assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    assert not (tmp_path / "new").exists()
