"""What questions, passages, models and the run directories of strangers say steers no terminal."""

from __future__ import annotations

import importlib
import io
import os
import signal
import time
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from agentic_rag_env import terminal as terminal_module
from agentic_rag_env.errors import RetrieverError
from agentic_rag_env.files import written_whole
from algorithms.analysis.comparison.table_formats import Table
from algorithms.launch.clear_errors import clear_errors
from algorithms.learner.types import Trajectory, Turn
from algorithms.training.evaluation import Evaluated
from algorithms.training.summary import _show, console, results_table, show_episode

HOSTILE = "\x1b[2J\x1b]0;x\x07[red][/]"
GROUP = {"n": 1, "exact_match": 1.0, "exact_match_interval": (1.0, 1.0), "f1": 1.0, "num_searches": 1.0,
         "malformed_fraction": 0.0}  # fmt: skip
IDS = np.zeros(1, dtype=np.int64)
TURN = Turn(IDS, np.zeros(1, dtype=np.float32), IDS, {"correct": True})  # type: ignore[arg-type]
TRAJECTORY = Trajectory(IDS, [TURN], 0, "policy", 1.0, True, True, False)


class Spelled:
    """A tokenizer whose only token is hostile."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return HOSTILE * len(ids)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_the_last_transcript():
    shown = terminal()
    show_episode(shown, HOSTILE, [TRAJECTORY], Spelled())
    said = shown.file.getvalue()
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\\x1b[2J\\x1b]0;x\\x07[red][/]" * 3 in said
    assert "a test episode of \\x1b[2J\\x1b]0;x\\x07[red][/]: right" in said


def test_the_commands_at_the_end_of_a_run_hold_where_its_path_has_a_blank(tmp_path):
    """And curves are named as far as a logger wrote them."""
    run_dir, shown = tmp_path / "my run", terminal()
    (run_dir / "tb").mkdir(parents=True)
    (run_dir / "metrics.jsonl").touch()
    best = {"checkpoint": "checkpoints/000002", "exact_match": 0.5}
    stages = [{"name": "x", "checkpoint": "checkpoints/000004", "best_on_dev": best}]
    result = Evaluated("x", figures={0.0: {"all": GROUP}}, trajectories={0.0: [TRAJECTORY]})
    summary = {"stages": stages, "demonstrations": {}, "gain": {}}
    _show(shown, run_dir, [result], summary, Spelled())  # type: ignore[arg-type]
    said = shown.file.getvalue()
    assert f"python -m algorithms.evaluate checkpoint='{run_dir}/checkpoints/000002'\n" in said
    assert f"curves:        tensorboard --logdir '{run_dir}/tb'\n" in said
    (run_dir / "tb").rmdir()
    _show(shown, run_dir, [result], summary, Spelled())  # type: ignore[arg-type]
    assert shown.file.getvalue().endswith(f"curves:        {run_dir}/metrics.jsonl\n")


def test_the_names_of_groups_in_a_table():
    result = Evaluated("x", figures={0.0: {"all": GROUP, HOSTILE: GROUP}})
    shown = terminal()
    shown.print(results_table([result]))
    assert "\x1b" not in shown.file.getvalue()
    assert "\\x1b[2J\\x1b]0;x\\x07[red][/]" in shown.file.getvalue()


def test_the_tables_of_a_comparison():
    shown = terminal()
    table = Table(
        "t", f"of {HOSTILE}", ["method", HOSTILE], [[HOSTILE, "[bold]"]], f"nq [open], hotpot[/dev], {HOSTILE}"
    )
    for block in table.rich(shown):
        shown.print(block)
    said = shown.file.getvalue()
    assert "\x1b" not in said
    assert said.count("\\x1b[2J\\x1b]0;x\\x07[red][/]") == 4
    assert "[bold]" in said
    assert "nq [open], hotpot[/dev]" in said


def test_errors_and_warnings(capsys: pytest.CaptureFixture[str]):
    with clear_errors():
        warning = warnings.formatwarning(UserWarning(f"a service said {HOSTILE}"), UserWarning, "file.py", 1)
    assert warning == "Warning: a service said \\x1b[2J\\x1b]0;x\\x07[red][/]\n"
    with pytest.raises(SystemExit), clear_errors():
        raise RetrieverError(f"status 500: {HOSTILE}")
    assert capsys.readouterr().err == "RetrieverError: status 500: \\x1b[2J\\x1b]0;x\\x07[red][/]\n"


def test_codes_of_emojis_and_markup_stay_as_strangers_wrote_them(capsys: pytest.CaptureFixture[str]):
    console().print("runs[/dev]/[open] :dog:")
    assert capsys.readouterr().out == "runs[/dev]/[open] :dog:\n"


COMMANDS = [
    "algorithms.run", "algorithms.evaluate", "algorithms.ask", "algorithms.compare", "algorithms.show",
    "agentic_rag_env.play", "agentic_rag_env.datasets.__main__",
    "agentic_rag_env.retrievers.indexing.cli", "agentic_rag_env.retrievers.serving.cli",
]  # fmt: skip


class Escaped(Exception):
    """The command has made sure that its streams escape what they lack."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_first_lets_its_streams_escape_what_their_encoding_lacks(command, monkeypatch):
    module = importlib.import_module(command)
    for place in (terminal_module, module):
        monkeypatch.setattr(place, "escape_what_streams_lack", Mock(side_effect=Escaped), raising=False)
    with pytest.raises(Escaped):
        module.main()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_no_half_written_file(tmp_path, capsys, signum):
    def write() -> None:
        with clear_errors(), written_whole(tmp_path / "summary.json") as partial:
            partial.write_text("{")
            os.kill(os.getpid(), signum)
            time.sleep(10)  # the signal ends it

    before = signal.getsignal(signal.SIGTERM)
    of_keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(SystemExit) as end:
            write()
    finally:
        signal.signal(signal.SIGINT, of_keyboard)
    assert end.value.code == 128 + signum  # as a shell reports it
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err in ("Terminated.\n", "Interrupted.\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_somebody_handles_is_left_to_them(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with clear_errors():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
