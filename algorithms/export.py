"""Export a trained agent: `python -m algorithms.export <run> --out DIR` writes a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.terminal import print_line
from algorithms.evaluate import Found, find
from algorithms.launch.clear_errors import clear_errors
from algorithms.learner.adapter_folders import find_adapter
from algorithms.training.agent_files import AGENT_FILE, shareable
from algorithms.training.model_card import model_card
from algorithms.training.run_files import read_summary

CARD_FILE = "README.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = parser().parse_args(arguments)
    with clear_errors():
        export(given.run, given.out)
        print_line(f"written to {given.out}: python -m algorithms.ask checkpoint={shlex.quote(str(given.out))}")


def export(run: str, out: Path) -> None:
    """Write weights, tokenizer, `agent.json` and a model card, as any program of the Hugging Face world reads them.

    An adapter is merged into its base model.

    Args:
        run: A run directory, which stands for its newest checkpoint, or the folder of a checkpoint.
        out: A folder that does not exist yet, or is empty.

    Raises:
        ConfigurationError: `out` holds something, or `run` is no checkpoint of a run.
    """
    found = find(run)
    if found.agent is None and found.run_dir is None:
        raise ConfigurationError(f"{run} comes from no run and has no {AGENT_FILE}; give what a run printed.")
    write(found, out)


def write(found: Found, out: Path, base: str | None = None) -> None:
    """Write what was found as a plain Hugging Face folder, whole or not at all.

    Args:
        found: A checkpoint, or another model folder.
        out: A folder that does not exist yet, or is empty.
        base: Folder or hub id of the model that an adapter belongs to; None: the one that it names.

    Raises:
        ConfigurationError: `out` holds something, or the model can't be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} holds something already; name a folder that does not exist.")
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _fill(partial, found, base, out.absolute().name)
        if out.exists():
            out.rmdir()
        partial.rename(out.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, found: Found, base: str | None, name: str) -> None:
    # Imported here, so that --help and the report of a typo need not wait for torch.
    from algorithms.learner.networks import load_model, load_tokenizer, no_progress_bars

    with no_progress_bars():
        load_model(found.model, dtype="auto", base=base).save_pretrained(folder)
        load_tokenizer(found.model, base=base).save_pretrained(folder)
    if found.agent is not None:
        (folder / AGENT_FILE).write_text(json.dumps(shareable(Path(found.model)), indent=1) + "\n", encoding="utf-8")
    adapter = find_adapter(found.model, base)
    known = {} if adapter is None else {"model": {"policy": adapter.base}}
    settings = found.settings if found.run_dir is not None else known
    card = model_card(name, found.agent, settings, _measured(found))
    (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")


def _measured(found: Found) -> dict[str, Any] | None:
    """The summary of the run with the figures of this checkpoint; None if the run has not measured it."""
    if found.run_dir is None:
        return None
    try:
        summary = read_summary(found.run_dir)
        names = [s["name"] for s in summary["stages"] if s["checkpoint"] == f"checkpoints/{Path(found.model).name}"]
        return {**summary, "figures": summary["evaluation"][names[-1]]} if names else None
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"summary.json of {found.run_dir} is not that of a run ({error!r}).") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "Write a trained agent as a plain Hugging Face folder, with agent.json and a model card."
    return folder_parser("export", what, "run directory, or the folder of a checkpoint")


def folder_parser(name: str, description: str, run: str) -> argparse.ArgumentParser:
    """The command line of a command that writes the model of a run to a folder.

    Args:
        name: The command, `algorithms.<name>`.
        description: What it does.
        run: What may be given as the run.
    """
    made = argparse.ArgumentParser(prog=f"python -m algorithms.{name}", description=description)
    made.add_argument("run", help=run)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    return made


if __name__ == "__main__":
    main()
