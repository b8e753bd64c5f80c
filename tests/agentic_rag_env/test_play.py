from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentic_rag_env.play import expand, main, score_line


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def files(tmp_path: Path) -> str:
    """A dataset of one question, as the value of --dataset."""
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    question = {"id": "1", "question": "What is the capital of France?", "golden_answers": ["Paris", "Lutetia"]}
    passage = {"id": "p", "contents": '"France"\nThe capital is \x1b[31m[bold]Paris[/bold].'}
    questions.write_text(json.dumps(question) + "\n")
    corpus.write_text(json.dumps(passage) + "\n")
    return json.dumps({"name": "jsonl", "questions": str(questions), "corpus": str(corpus)})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("search: rivers of France", "<search> rivers of France </search>"),
        ("  Answer :Paris ", "<answer> Paris </answer>"),
        ("search: a: b", "<search> a: b </search>"),
        ("search:", "<search>  </search>"),
        ("<search> q </search>", "<search> q </search>"),
        ("I think: yes", "I think: yes"),
        ("answer", "answer"),
        ("", ""),
    ],
)
def test_shortcuts(line: str, text: str) -> None:
    assert expand(line) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("Paris", " Paris </answer>"),
        ("answer: Paris", " Paris </answer>"),
        ("note: Paris", " note: Paris </answer>"),
        (" Paris </answer>", " Paris </answer>"),
    ],
)
def test_shortcuts_after_a_forced_opening_tag(line: str, text: str) -> None:
    assert expand(line, forced=True) == text


def test_two_questions(files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "search: capital\nhm\n<answer> paris </answer>\nanswer: London\n")
    assert main(["--dataset", files, "--episodes", "2", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    # What a passage contains can neither style nor steer the terminal.
    assert 'Doc 1(Title: "France") The capital is \\x1b[31m[bold]Paris[/bold].' in out
    assert "\x1b" not in out
    assert "No action in that: neither </search> nor </answer>." in out
    assert "Correct: Paris / Lutetia" in out
    assert "Not quite (F1 0.00). The answer: Paris / Lutetia" in out
    assert out.endswith("Score: 1 of 2 correct, F1 0.50, 0.5 searches per question.\n")


def test_leaving_in_the_middle(files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "answer: Paris\nsearch: x\n")
    assert main(["--dataset", files]) == 0
    assert capsys.readouterr().out.endswith("Score: 1 of 1 correct, F1 1.00, 0.0 searches per question.\n")
    typed(monkeypatch, "")
    assert main(["--dataset", files]) == 0
    assert capsys.readouterr().out.endswith("No question finished.\n")


def test_running_out_of_turns(files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "search: x\nsearch: y\n")
    assert main(["--dataset", files, "--max-turns", "1", "--episodes", "1"]) == 0
    out = capsys.readouterr().out
    assert "[turn 1 of 1]" in out
    assert "[last turn: answer]" in out
    assert "Out of turns. The answer: Paris / Lutetia" in out


def test_forced(files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "search: x\nLutetia\n")
    assert main(["--dataset", files, "--max-turns", "1", "--final-turn", "forced", "--episodes", "1"]) == 0
    assert "Correct: Paris / Lutetia" in capsys.readouterr().out


def test_interrupt_leaves_politely(
    files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert main(["--dataset", files]) == 0
    assert capsys.readouterr().out.endswith("No question finished.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "tinny"], "Did you mean 'tiny'?"),
        (["--max-turns", "0"], "max_turns must be an integer of at least 1, got 0."),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_broken_json_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "{name: tiny}"])
    assert "not valid JSON" in capsys.readouterr().err


def test_no_question_no_score() -> None:
    assert score_line([]) == "No question finished."


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    question = {"id": "1", "question": "Where is \x1b]0;x\x07 Zürich 東京?", "golden_answers": ["Suisse 東"]}
    questions.write_text(json.dumps(question) + "\n")
    corpus.write_text(json.dumps({"id": "p", "contents": "Zürich\nZürich \x1b[2J in der Schweiz – 東京"}) + "\n")
    dataset = json.dumps({"name": "jsonl", "questions": str(questions), "corpus": str(corpus)})
    done = subprocess.run(
        [sys.executable, "-m", "agentic_rag_env.play", "--dataset", dataset, "--episodes", "1"],
        input=b"search: Z\xfcrich\nanswer: \x81\xff\x1b[2J\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode(encoding)
    assert "\x1b" not in said
    assert "Where is \\x1b]0;x\\x07 Z" in said
    assert "Score: 0 of 1 correct" in said


def test_without_rich(files: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["--dataset", files]) == 2
    assert capsys.readouterr().err == "Playing in a terminal needs the library rich: pip install rich.\n"


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentic_rag_env.play", "--seed", "0", "--episodes", "1"],
        input="answer: nobody\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Question: " in done.stdout
    assert done.stdout.endswith("Score: 0 of 1 correct, F1 0.00, 0.0 searches per question.\n")
    assert done.stderr == ""
