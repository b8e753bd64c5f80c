"""Check files of questions before a run uses them.

python -m agentic_rag_env.datasets check train.jsonl test.parquet
python -m agentic_rag_env.datasets check musique/dev.jsonl --corpus musique/corpus.jsonl.gz
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.check import (
    Coverage,
    FileReport,
    Finding,
    answer_lengths,
    check_file,
    coverages,
    overlaps,
)
from agentic_rag_env.terminal import command_parser, printable, rich_console, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0, 1 where a file has errors, or 2 where the corpus can't be read.
    """
    return run_command(lambda: _check(_parser().parse_args(arguments)))


def _check(options: argparse.Namespace) -> int:
    console = rich_console("Checking datasets")
    reports = [check_file(path) for path in options.files]
    between = overlaps(reports)
    covered = coverages(reports, read_corpus(options.corpus)) if options.corpus else []
    for report, coverage in zip(reports, covered, strict=False):
        _add_missing_gold(report, coverage)
    console.print(_table(reports, covered, console.encoding))
    for report in reports:
        _print_findings(console, report.path, report.findings)
    _print_findings(console, "Between files", between)
    num_errors = sum(report.num_errors for report in reports) + sum(finding.is_error for finding in between)
    closing = f"Errors of {num_errors} kind{'s' * (num_errors > 1)}; mend them first." if num_errors else "No errors."
    console.print(closing, style="bold red" if num_errors else "bold green")
    return 1 if num_errors else 0


def _add_missing_gold(report: FileReport, coverage: Coverage) -> None:
    if coverage.missing_gold:
        passage, question = coverage.missing_gold[0]
        example = f"passage {passage!r} of question {question!r}"
        advice = "Give the corpus that belongs to the file; recall would be measured too low."
        finding = Finding(True, len(coverage.missing_gold), "gold passage that the corpus lacks", example, advice)
        report.findings.insert(0, finding)


def _table(reports: Sequence[FileReport], covered: Sequence[Coverage], encoding: str) -> Any:
    """A table with a line per file; `words` counts the first answers' (median, most), `corpus` what it can answer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    table.add_column("file, format", overflow="fold")
    for column in ("rows", "usable", "answers", "words", "errors", "warnings", *(["corpus"] if covered else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for number, report in enumerate(reports):
        lengths = answer_lengths(report) or [0]
        num_answers = sum(len(question.golden_answers) for question in report.questions)
        table.add_row(
            Text(printable(f"{report.path}\n  {', '.join(report.formats) or 'not read'}", encoding)),
            f"{report.num_rows:,}",
            f"{len(report.questions):,}",
            f"{num_answers / len(lengths):.1f}",
            f"{lengths[len(lengths) // 2]}, {lengths[-1]}",
            f"{report.num_errors}",
            f"{len(report.findings) - report.num_errors}",
            *(f"{cover.num_answerable / max(cover.num_questions, 1):.1%}" for cover in covered[number : number + 1]),
        )
    return table


def _print_findings(console: Any, title: str, findings: Sequence[Finding]) -> None:
    def shown(text: str) -> str:
        return printable(text, console.encoding)

    if findings:
        console.print(shown(title), style="bold")
    for finding in findings:
        kind, style = ("error", "red") if finding.is_error else ("warning", "yellow")
        console.print(f"  {kind}", style=style, end="")
        console.print(shown(f"  {finding.number:,} x {finding.what}"))
        console.print(shown(f"      first: {finding.example}\n      {finding.advice}"), style="dim")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m agentic_rag_env.datasets", __doc__)
    check = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check", help="report what is wrong with files of questions; exit status 1 if there are errors"
    )
    check.add_argument("files", nargs="+", help="questions: .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow")
    check.add_argument("--corpus", help="file of passages in which answers and gold passages are looked for")
    return parser


if __name__ == "__main__":
    sys.exit(main())
