"""Text for a terminal. What strangers wrote can't steer it there, and what its encoding lacks is escaped."""

from __future__ import annotations

import io
import sys
import unicodedata
from typing import Any, TextIO

from agentic_rag_env.errors import required_library


def printable(text: str, encoding: str | None = None) -> str:
    """Text that a terminal can show and that can't steer it: control characters and the like are escaped.

    Whatever comes from a dataset, a corpus, a service, a model or another's run directory goes through here before it
    is printed.

    Args:
        text: The text to print.
        encoding: Encoding of the terminal; characters that it lacks are escaped. None: UTF-8.
    """
    shown = "".join(
        char if char.isprintable() or char == "\n" or unicodedata.category(char) == "Zs" else ascii(char)[1:-1]
        for char in text
    )
    encoding = encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def escape_what_streams_lack() -> None:
    """Let stdout and stderr escape the characters that their encoding lacks, whoever prints them.

    Every command calls this first. Without it, a path or a model's word would end a finished run with an error on a
    terminal that knows cp1252 or ASCII only.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and tests put other objects in their place
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line of text by strangers, such as an error that quotes them, at once; by default to stdout."""
    file = file or sys.stdout
    print(printable(text, file.encoding), file=file, flush=True)


def rich_console(command: str) -> Any:
    """The console of a command that needs the library rich.

    Args:
        command: The command that needs it, for the error.

    Raises:
        ConfigurationError: `rich` is missing.
    """
    with required_library(f"{command} needs the library rich: pip install rich."):
        from rich.console import Console
    return Console(highlight=False, markup=False, soft_wrap=True)
