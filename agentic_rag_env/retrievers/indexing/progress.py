"""Shows how far the building of an index is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TypeAlias

#: Announces a phase by its name and number of items (None: unknown). It yields a function that counts finished items.
Phase: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

#: Seconds between two lines of progress where there is no terminal.
_LINE_EVERY_S = 30.0


def silent(name: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    return nullcontext(lambda count: None)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the progress of some work and the time left: in a terminal by a bar, elsewhere by a line now and then.

    Args:
        description: What is done.
        total: Number of items; None: unknown.

    Yields:
        A function to call with the number of further items done.
    """
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(description + ("" if total is None else f" ({total})"), flush=True)
        yield _lines(description, total)
        return
    from rich import progress as bars

    columns = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    left = (bars.TextColumn("left:"), bars.TimeRemainingColumn())
    with bars.Progress(bars.TextColumn("{task.description}"), *columns, *left) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _lines(description: str, total: int | None) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        left = "" if total is None else f" of {total}, {(now - start) * (total - done) / done:.0f} s left"
        print(f"{description}: {done}{left}", flush=True)

    return advance
