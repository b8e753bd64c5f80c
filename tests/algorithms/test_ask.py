"""Asking an agent: a question of one's own in, every turn out."""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from agentic_rag_env.registry import DATASETS
from algorithms import ask

WORLD = [
    "dataset=tiny",
    "dataset.num_passages=150",
    "dataset.num_questions=60",
    "threads=1",
    "rollout.max_new_tokens=32",
]


def run(*arguments: str, typed: str | None = None, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    if typed is not None:
        lines = iter(typed.splitlines())
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    try:
        with patch.object(sys, "argv", ["ask", *arguments]):
            ask.main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_question_is_played_turn_by_turn_over_the_corpus(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    question = DATASETS.build({"name": "tiny", "num_passages": 150, "num_questions": 60, "split": "test"})[0].text
    assert run("checkpoint=tiny-teacher", f"question={question}", *WORLD, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "tiny-teacher on cpu, float32, greedy" in out
    assert out.index("<search>") < out.index("<information>Doc 1(Title:") < out.index("\nAnswer: ")
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_questions_are_typed_until_an_empty_line(capsys, monkeypatch):
    assert run("checkpoint=tiny-student", *WORLD, typed="Where?\nWho?\n\n", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("No answer (out_of_turns") == 2


def test_a_failed_search_does_not_end_the_conversation(capsys, monkeypatch):
    failing = ["retriever=faulty", "retriever.error_fraction=1"]
    assert run("checkpoint=tiny-teacher", *WORLD, *failing, typed="Where?\nWho?\n\n", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("No answer (") == 2


def test_a_run_without_a_checkpoint_is_refused(capsys, monkeypatch, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("{}")
    assert run(f"checkpoint={tmp_path}", "question=a", monkeypatch=monkeypatch) == 1
    assert "has no complete checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["who?", 'what\'s up, doc? (a) [b] {c} = "x"', "a\\'b", "end\\", "${x} \\ y", "ünï $5", "", " a ", "\\\\'"]
)
def test_a_question_may_hold_anything(text):
    given = OverridesParser.create().parse_override(ask._quoted(f"question={text}")).value()
    assert OmegaConf.create({"question": given}).question == text
    assert ask._quoted("env.top_k=1") == "env.top_k=1"
