"""Look at trajectories: `python -m algorithms.show <run directory> [<another>]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import written_whole
from agentic_rag_env.terminal import escape_what_streams_lack, print_line, printable
from agentic_rag_env.types import Ending
from algorithms.analysis.runs import Run
from algorithms.analysis.viewer.episodes import FIGURES
from algorithms.analysis.viewer.gallery import Gallery, Wanted, gather
from algorithms.analysis.viewer.page import page
from algorithms.analysis.viewer.shading import splitters
from algorithms.analysis.viewer.terminal import Printer, page_through
from algorithms.launch.clear_errors import clear_errors

PAGE = "trajectories.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    escape_what_streams_lack()
    given = parser().parse_args(arguments)
    with clear_errors():
        show(given, Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False))


def show(given: argparse.Namespace, terminal: Console) -> None:
    """Write the page, and show the episodes in the terminal.

    Args:
        given: The command line.
        terminal: Where to print. If it is a real terminal, it is also asked for keys.
    """
    wanted = Wanted(**{name: getattr(given, name) for name in Wanted.__dataclass_fields__})
    gallery = gather(given.runs, wanted)
    if not gallery.items:
        raise ConfigurationError("No episode passes these filters; leave one of them out.")
    splits, problems = splitters(gallery) if given.page or given.shade else ([], [])
    for problem in problems:
        print_line(problem, sys.stderr)
    if given.page:
        file = given.html or given.runs[0].expanduser() / PAGE
        shown, notes = _capped(gallery, given.limit)
        title = "Trajectories of " + " and ".join(_name(run) for run in gallery.runs)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial:
            partial.write_text(page(title, shown, splits, [*notes, *problems]), encoding="utf-8")
        terminal.print(f"{len(shown.items)} episodes written to {file}", soft_wrap=True, markup=False, highlight=False)
        for note in notes:
            terminal.print(printable(note, terminal.encoding), soft_wrap=True, markup=False, highlight=False)
    printer = Printer(gallery, terminal, given.shade, splits)
    printer.legend()
    if sys.stdin.isatty() and terminal.file.isatty():
        page_through(gallery, printer, input)
        return
    for number in range(min(given.num, len(gallery.items))):
        printer.item(number)


def _name(run: Run) -> str:
    return run.name if run.seed is None else f"{run.name}, seed {run.seed}"


def _capped(gallery: Gallery, limit: int) -> tuple[Gallery, list[str]]:
    """Choose what goes on the page, and say what does not."""
    count = len(gallery.items)
    if count <= limit:
        return gallery, []
    note = f"Only the first {limit} of {count} episodes are on the page; --limit {count} puts all of them there."
    return replace(gallery, items=gallery.items[:limit]), [note]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m algorithms.show",
        description="Page through the trajectories that runs have saved, and write them as one self-contained HTML "
        "page with colours per token. Several runs stand side by side, question by question. By default: the trained "
        "model's greedy answers to the test questions, and the samples of training.",
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="run", help="run directory")
    files = made.add_argument_group("which files")
    files.add_argument("--split", help="train, dev, test, ...")
    files.add_argument("--model", dest="models", action="append", default=[], help="raw, teacher, a stage; repeatable")
    files.add_argument("--mode", help="of decoding: greedy, T=1, ...")
    files.add_argument("--step", type=int, help="of training, for --split train and dev")
    files.add_argument(
        "--file",
        dest="files",
        action="append",
        default=[],
        metavar="NAME",
        help="in trajectories/; * works; repeatable",
    )
    which = made.add_argument_group("which episodes")
    verdicts = which.add_mutually_exclusive_group()
    verdicts.add_argument("--right", dest="verdict", action="store_const", const="right", help="answered right")
    verdicts.add_argument("--wrong", dest="verdict", action="store_const", const="wrong", help="not answered right")
    which.add_argument("--ending", choices=[str(ending) for ending in Ending], help="over for this reason")
    which.add_argument("--group", help="of questions: a dataset, or a number of hops")
    which.add_argument("--malformed", action="store_true", help="with a malformed turn")
    which.add_argument("--searches", type=int, metavar="N", help="with so many executed searches")
    which.add_argument("--text", help="with these words in question, golden answers or the model's turns")
    output = made.add_argument_group("how")
    output.add_argument("--shade", choices=FIGURES, help="colour the tokens in the terminal by this figure")
    output.add_argument(
        "--num", type=_count, default=3, help="episodes printed where there is no terminal (%(default)s)"
    )
    output.add_argument("--html", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the first run)")
    output.add_argument("--no-html", dest="page", action="store_false", help="write no page")
    output.add_argument("--limit", type=_count, default=1000, help="most episodes on the page (%(default)s)")
    return made


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a number of at least 0: {text}")
    return int(text)


if __name__ == "__main__":
    main()
