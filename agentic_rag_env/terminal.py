"""Text for a terminal. What strangers wrote can't steer it there, and what its encoding lacks is escaped."""

from __future__ import annotations

import argparse
import io
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TextIO

from agentic_rag_env.errors import AgenticRAGError, required_library
from agentic_rag_env.registry import name_or_mapping
from agentic_rag_env.settings import meanings_of


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


def run_command(work: Callable[[], int | None]) -> int:
    """Carry out a command: the streams escape what they lack, and a user's mistake becomes a line on stderr.

    Args:
        work: Reads the command line, does what it asks for, and returns the exit status; None stands for 0.

    Returns:
        The exit status; 2 after a mistake.
    """
    escape_what_streams_lack()
    try:
        return work() or 0
    except AgenticRAGError as error:
        print_line(str(error), sys.stderr)
        return 2


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of command lines whose help shows a description line by line, as a module's docstring has it."""
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_settings(parser: argparse.ArgumentParser, config: type, *names: str) -> None:
    """Add an option to a parser for each setting of a dataclass, with its meaning and its default.

    Args:
        parser: The parser.
        config: The dataclass, whose docstring says what each setting means.
        *names: Settings to add; none: all.
    """
    types: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "Any": name_or_mapping}
    meanings = meanings_of(config)
    for setting in fields(config):
        if setting.name in (names or meanings):
            parser.add_argument(
                f"--{setting.name.replace('_', '-')}",
                type=types.get(str(setting.type).partition(" ")[0], str),
                default=setting.default,
                metavar=setting.name.rpartition("_")[2].upper(),
                help=f"{meanings[setting.name].replace('%', '%%')} (default: %(default)s)",
            )


def rich_console(command: str) -> Any:
    """The console of a command that needs the library rich.

    Args:
        command: The command that needs it, for the error.

    Raises:
        ConfigurationError: `rich` is missing.
    """
    with required_library(f"{command} needs the library rich: pip install rich."):
        from rich.console import Console
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
