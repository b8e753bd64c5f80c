"""What `python -m agentic_rag_env.datasets check` finds in files of questions, and how it says so."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentic_rag_env.datasets.__main__ import main
from agentic_rag_env.datasets.check import Coverage, answer_lengths, check_file, coverages, overlaps
from agentic_rag_env.types import Passage


def row(text: str, *answers: str, **more: Any) -> dict[str, Any]:
    return {"question": text, "golden_answers": list(answers), **more}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def found(path: Path) -> list[tuple[bool, int, str]]:
    return [(finding.is_error, finding.number, finding.what) for finding in check_file(path).findings]


def test_a_sound_file(tmp_path: Path) -> None:
    file = write(tmp_path / "dev.jsonl", row("Who?", "Ann", "Mrs A. B."), row("Where?", "in the city of Rome"))
    report = check_file(file)
    assert (report.num_rows, len(report.questions), dict(report.formats)) == (2, 2, {"FlashRAG": 2})
    assert report.findings == []
    assert answer_lengths(report) == [1, 4]  # "in city of rome"


def test_formats(tmp_path: Path) -> None:
    target = {"reward_model": {"ground_truth": {"target": ["Rome"]}}, "data_source": "nq"}
    rows = [row("a?", "b"), {"question": "c?", **target}, {"query": "?"}]
    assert dict(check_file(write(tmp_path / "q.jsonl", *rows)).formats) == {"FlashRAG": 1, "Search-R1": 1, "unknown": 1}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("a?")], (True, 1, "field 'golden_answers': is empty")),
        ([row("a?", ""), row("b?", "x", " ")], (True, 2, "field 'golden_answers'[...]: is blank")),
        ([row(" ", "a")], (True, 1, "field 'question': is empty")),
        ([{"question": "a?"}], (True, 1, "no field 'golden_answers' (nor 'reward_model.ground_truth.target')")),
        ([row("a?", "P", "a", "r")], (True, 1, "answer exploded into single characters")),
        ([row("a?", "The"), row("b?", "!", "a")], (False, 2, "every answer is empty once normalized")),
        ([row("a?", "['George Rankin', 'G. Rankin']")], (False, 1, "list of answers written as text")),
        ([row("a?", "b"), {"id": "1", "contents": "T\nx"}], (True, 1, "passage and no question")),
        ([{"id": "1", "title": "T", "text": "x"}], (True, 1, "passage and no question")),
        ([row("a?", "×", "*")], (False, 1, "an answer among others is empty once normalized")),
        ([row("a?", "b", id="q"), row("c?", "d", id="q")], (True, 1, "id used before")),
        ([row("What is it?", "b"), row("what is the  it", "B.")], (False, 1, "question asked before")),
        ([row("a b?", "c"), row("b?", "d")], (False, 1, "question asked before, with none of the same answers")),
        ([row("a?", "w " * 21)], (False, 1, "no answer of 20 words or fewer")),
        ([row("who is it", "b")], (False, 1, "no question mark at the end")),
        ([row("a?", "b"), "{"], (True, 1, "line that can't be read; those after it are left out")),
        (
            [row("a?", "b", metadata={"supporting": given}) for given in ("abc", "p1")],
            (True, 2, "field 'metadata.supporting': expected a list of passage ids, got str"),
        ),
        (
            [row("a?", "b", metadata={"supporting": [["Rome", 0]]})],
            (True, 1, "field 'metadata.supporting'[...]: expected an id, a string or an integer, got list"),
        ),
        ([], (True, 1, "no row that is a question")),
    ],
)
def test_what_is_found(tmp_path: Path, rows: list[Any], expected: tuple[bool, int, str]) -> None:
    file = write(tmp_path / "q.jsonl", *rows, *([row("sound?", "yes")] if rows else []))
    assert expected in found(file)


def test_nothing_is_found_that_is_not_there(tmp_path: Path) -> None:
    sound = [row("a?", "7", "8", "9"), row("b?", "B", "C", "D"), row("c?", "w " * 21, "w"), row("d? ", "The Who")]
    assert found(write(tmp_path / "q.jsonl", *sound)) == []


def test_question_marks_of_other_scripts_end_a_question(tmp_path: Path) -> None:
    texts = ("是谁？", "من هو؟", "What⁇", "When? ", "Who", "¿Why")
    file = write(tmp_path / "q.jsonl", *(row(text, "b") for text in texts))
    assert found(file) == [(False, 2, "no question mark at the end")]


def test_the_first_example_and_what_to_do(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", row("a?", "b"), row("b?", "x", "y", "z"), row("c?", "x", "y", "z"))
    (finding,) = check_file(file).findings
    assert finding.number == 2
    assert finding.example == "line 2: 'b?': ['x', 'y', 'z']"
    assert "take the file from its publisher" in finding.advice
    assert [question.text for question in check_file(file).questions] == ["a?"]


def test_a_missing_file_a_bad_line_and_a_damaged_file_each_have_their_own_advice(tmp_path: Path) -> None:
    damaged = tmp_path / "q.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"{}\n" * 9)[:-9])
    for file, what, advice in (
        (tmp_path / "nope.jsonl", "no such file", "Give the path of a file of questions."),
        (write(tmp_path / "q.jsonl", "{"), "line that can't be read; those after it are left out", "Mend the line; "),
        (damaged, "broken off: the rest of the file can't be read", "Fetch or write the file anew."),
    ):
        found_last = check_file(file).findings[-1]
        assert (found_last.what, found_last.advice.startswith(advice)) == (what, True)


def test_errors_come_first(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", row("no mark", "b"), row("c?", ""))
    assert [is_error for is_error, _, _ in found(file)] == [True, False]


def test_overlap_is_a_leak_between_train_and_test_only(tmp_path: Path) -> None:
    names = ("train.jsonl", "test.jsonl", "dev.jsonl")
    reports = [check_file(write(tmp_path / name, row(f"only {name}?", "x"), row("Shared, A?", "y"))) for name in names]
    findings = overlaps(reports)
    assert [(finding.is_error, finding.number) for finding in findings] == [(True, 1), (True, 1), (False, 1)]
    assert "'Shared, A?' (train-2)" in findings[0].example
    assert overlaps(reports[:1]) == []


def test_coverage(tmp_path: Path) -> None:
    rows = [
        row("a?", "New York", metadata={"supporting": ["p1", "gone"]}),
        row("b?", "Ork"),  # no word of its own in "York"
        row("c?", "nowhere", "the Seine!"),
        row("d?", "yes"),
        row("e?", "New York City"),
        row("f?", "x", "y", "z"),
    ]
    reports = [
        check_file(write(tmp_path / "q.jsonl", *rows)),
        check_file(write(tmp_path / "r.jsonl", row("g?", "Oslo"))),
    ]
    corpus = [Passage("p1", '"A"\nHe lives in New York.'), Passage("p2", '"B"\nAlong Seine, new, and York')]
    assert coverages(reports, corpus) == [Coverage(4, 2, [("gone", "q-1")]), Coverage(1, 0, [])]


def test_gold_passages_of_another_form_are_a_finding_with_a_corpus_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("a?", "Rome", metadata={"supporting": given}) for given in ([["Rome", 0]], "abc", 5, [1])]
    file = write(tmp_path / "dev.jsonl", *rows)
    corpus = write(tmp_path / "c.jsonl", {"id": 1, "contents": "A\nIn Rome."})
    for more in ([], ["--corpus", str(corpus)]):
        assert main(["check", str(file), *more]) == 1
        printed = capsys.readouterr().out
        assert "Errors of 3 kinds" in printed
        assert "metadata.supporting" in printed
    assert coverages([check_file(file)], [Passage("1", "A\nIn Rome.")]) == [Coverage(1, 1, [])]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.jsonl", row("a?", "Rome", metadata={"supporting": ["p"]}), row("b?", "Oslo"))
    corpus = write(tmp_path / "c.jsonl", {"id": "p", "contents": "A\nIn Rome."})
    assert main(["check", str(train), "--corpus", str(corpus)]) == 0
    printed = capsys.readouterr().out
    assert "50.0%" in printed
    assert "FlashRAG" in printed
    assert "No errors." in printed
    test = write(tmp_path / "test.jsonl", row("b?", "Oslo", metadata={"supporting": ["q"]}))
    assert main(["check", str(train), str(test), "--corpus", str(corpus)]) == 1
    printed = capsys.readouterr().out
    assert "question in both" in printed
    assert "passage 'q' of question 'test-1'" in printed
    assert "Errors of 2 kinds" in printed
    assert main(["check", str(tmp_path / "[none].jsonl")]) == 1
    assert "[none].jsonl: cannot be read" in capsys.readouterr().out
    assert main(["check", str(train), "--corpus", str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl: cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["check"])
    assert stopped.value.code == 2


def test_what_a_file_says_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "\x1b[31m.jsonl", row("\x1b[2J[red]Who", "x"))
    assert main(["check", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "no question mark at the end" in printed
    assert "\\x1b[31m.jsonl" in printed
    assert "[red]Who" in printed


def test_without_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["check", str(write(tmp_path / "a.jsonl", row("a?", "Rome")))]) == 2
    assert capsys.readouterr().err == "Checking datasets needs the library rich: pip install rich.\n"


def test_as_a_module(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", row("a?", "the"), row("b?", ""))
    command = [sys.executable, "-m", "agentic_rag_env.datasets", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "every answer is empty once normalized" in done.stdout
    assert done.stderr == ""
