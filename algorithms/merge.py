"""Merge an adapter into its base model: `python -m algorithms.merge <run> --out DIR` writes a plain model folder."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.terminal import print_line
from algorithms.evaluate import find
from algorithms.export import folder_parser, write
from algorithms.launch.clear_errors import clear_errors
from algorithms.learner.adapter_folders import find_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = parser().parse_args(arguments)
    with clear_errors():
        merge(given.run, given.out, given.base)
        print_line(f"written to {given.out}: python -m algorithms.evaluate checkpoint={shlex.quote(str(given.out))}")


def merge(run: str, out: Path, base: str | None = None) -> None:
    """Write the whole model that an adapter makes of its base model, as `algorithms.export` writes an agent.

    Args:
        run: A run directory, which stands for its newest checkpoint; or a folder or hub id with an adapter, also one
            that comes from no run.
        out: A folder that does not exist yet, or is empty.
        base: Folder or hub id of the base model; None: the one that the adapter names.

    Raises:
        ConfigurationError: `out` holds something, or `run` is no adapter that can be read here.
    """
    found = find(run)
    if find_adapter(found.model, base) is None:
        given = shlex.join([run, "--out", str(out)])
        raise ConfigurationError(
            f"{run} holds a whole model and no adapter, so there is nothing to merge. For a folder to share: python -m "
            f"algorithms.export {given}"
        )
    write(found, out, base)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "Merge an adapter (LoRA) into its base model, and write a plain Hugging Face folder."
    made = folder_parser("merge", what, "run directory, or a folder or hub id with an adapter")
    made.add_argument("--base", metavar="MODEL", help="folder or hub id of the base model, where it lies elsewhere")
    return made


if __name__ == "__main__":
    main()
