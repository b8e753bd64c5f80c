"""Compare runs: `python -m algorithms.compare <run or multirun directories...>`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agentic_rag_env.terminal import escape_what_streams_lack
from algorithms.analysis.comparison.study import Options, compare
from algorithms.launch.clear_errors import clear_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    escape_what_streams_lack()
    given = parser().parse_args(arguments)
    with clear_errors():
        compare(
            given.runs,
            given.out,
            Options(
                force=given.force,
                with_paper=given.paper,
                against=given.against,
                setting=tuple(given.x.split(",")) if given.x else (),
                resamples=given.resamples,
            ),
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m algorithms.compare",
        description="Tables, tests, curves and one page out of finished runs. Runs that differ in nothing but the seed "
        "make one method.",
    )
    made.add_argument("runs", nargs="+", type=Path, help="run directories, or folders with runs anywhere below")
    made.add_argument("--out", type=Path, default=Path("comparison"), help="folder for what is written (%(default)s)")
    made.add_argument("--against", metavar="METHOD", help="compare all methods with this one instead of all pairs")
    made.add_argument("--paper", action="store_true", help="show the paper's averages and the agreement of the orders")
    made.add_argument(
        "--x",
        metavar="SETTING[,SETTING...]",
        help="plot the score against a numeric setting; the first that a run has counts, such as "
        "algo.num_demonstrations,algo.warm_start.num_demonstrations",
    )
    made.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over seeds (%(default)s)")
    made.add_argument("--force", action="store_true", help="go on although the runs are not comparable")
    return made


if __name__ == "__main__":
    main()
