"""A run that is killed with SIGKILL, wherever it is, and resumed ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from small_runs import DGPO, DGPO_STEPS, KD_STEPS, TINY, Run, assert_same_run, command, resume

from algorithms.training import checkpoint
from algorithms.training.trainer import Trainer

STEPS = KD_STEPS + DGPO_STEPS

#: Where a process may kill itself: what it has just called, or is about to call, when it dies.
PLACES = {
    "weights half written": "transformers.PreTrainedModel.save_pretrained",
    "state not written": "torch.save",
    "manifest not written": "algorithms.training.checkpoint._write_manifest",
    "not on the disk": "algorithms.training.checkpoint.sync_all",
    "not in place": "algorithms.training.checkpoint._put_in_place",
    "old ones not removed": "algorithms.training.checkpoint._prune",
    "half of an old one removed": "shutil.rmtree",
    "step not logged": "algorithms.training.run_logger.RunLogger.write",
    "step not saved": "algorithms.training.trainer.Trainer._save",
    "transcripts not in place": "algorithms.training.trainer.write_check",
    "sample not in place": "algorithms.training.trainer.write_sample",
    "evaluation not written": "algorithms.training.evaluation.write_trajectories",
    "summary not written": "algorithms.training.summary.write_summary",
}


def child(arguments: list[str], place: str | None, count: int) -> None:
    """Run the command; with a place, die at its `count`-th call."""
    sys.stdout = sys.stderr = io.StringIO()
    if place is None:
        command(*arguments)
        return
    calls = []

    def dying(original: Callable) -> Callable:
        def call(*args, **settings):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **settings)

        return call

    module, _, name = place.rpartition(".")
    target = pkgutil.resolve_name(module)
    with patch.object(target, name, dying(getattr(target, name))):
        command(*arguments)


@pytest.fixture(scope="session")
def processes():
    """Makes processes from a server that has imported everything once, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["algorithms.run", "small_runs"])
    return context


class Killed:
    """Begins a run, or goes on with it, in a process of its own that gets killed."""

    def __init__(self, processes, path: Path, cache: Path) -> None:
        self.processes, self.path = processes, path
        self.begin = [*TINY, *DGPO, f"hydra.run.dir={path}", f"cache_dir={cache}"]

    def start(self, place: str | None = None, count: int = 0):
        begun = (self.path / ".hydra" / "config.yaml").exists()
        arguments = [f"resume={self.path}"] if begun else self.begin
        process = self.processes.Process(target=child, args=(arguments, place, count))
        process.start()
        return process

    def at(self, place: str, count: int) -> bool:
        """Kill it at the `count`-th visit to a place; False if it ended before."""
        process = self.start(PLACES[place], count)
        return self.was_killed(process)

    def after(self, num_lines: int, delay_s: float) -> bool:
        """Kill it some seconds after it has logged a step; False if it ended before."""
        process = self.start()
        while process.is_alive() and self.num_lines() < num_lines:
            time.sleep(0.005)
        process.join(delay_s)
        process.kill()
        return self.was_killed(process)

    @staticmethod
    def was_killed(process) -> bool:
        process.join()
        time.sleep(1)  # TensorBoard reads event files in the order of the second in which they were made
        return process.exitcode == -signal.SIGKILL

    def finish(self) -> Run:
        """Go on undisturbed, from the beginning if it was killed before it had one."""
        if (self.path / ".hydra" / "config.yaml").exists():
            return resume(self.path)
        assert command(*self.begin).code == 0
        return Run(self.path)

    def num_lines(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.path / "metrics.jsonl").read_bytes().count(b"\n")
        return 0


def test_killed_twice_and_resumed_it_ends_as_if_nothing_had_happened(dgpo_run, tmp_path, cache, processes):
    killed = Killed(processes, tmp_path / "run", cache)
    assert killed.at("not in place", 2)  # the second checkpoint of the first stage
    assert [path.name for path in (killed.path / "checkpoints").iterdir()] != ["000002"]  # its remains are there
    assert killed.after(random.randrange(KD_STEPS, STEPS - 1), 0.1)  # whichever step this is in the second stage
    assert not (killed.path / "summary.json").exists()
    again = resume(killed.path)
    assert "resuming after step" in again.out
    assert_same_run(dgpo_run, again)
    assert_same_state(dgpo_run, again)


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(10))
def test_killed_at_random_moments(dgpo_run, tmp_path, cache, processes, attempt):
    draw, kills = random.Random(), []
    killed = Killed(processes, tmp_path / "run", cache)
    for _ in range(draw.randrange(1, 4)):
        moment = draw.randrange(STEPS), draw.uniform(0, 1.5)
        kills.append((*moment, killed.after(*moment)))
    print(kills)
    again = killed.finish()
    assert_same_run(dgpo_run, again)
    assert_same_state(dgpo_run, again)


@pytest.mark.parametrize("place", PLACES.values())
def test_every_delicate_place_exists(place):
    pkgutil.resolve_name(place)


@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_every_delicate_place(dgpo_run, tmp_path, cache, processes, place, count):
    killed = Killed(processes, tmp_path / "run", cache)
    assert killed.at(place, count) or count == 3  # not every place is visited so often
    again = resume(killed.path)
    assert_same_run(dgpo_run, again)
    assert_same_state(dgpo_run, again)


def assert_same_state(first: Run, second: Run) -> None:
    """The last checkpoints agree in critic, optimizers and the rest, but for the times."""
    file = Path("checkpoints") / f"{STEPS:06d}" / "training_state.pt"
    mine, theirs = (torch.load(run.path / file, weights_only=True) for run in (first, second))
    for state in (mine, theirs):
        costs = state["trainer"]["position"].pop("costs")
        state["costs"] = {name: cost for name, cost in costs.items() if not name.endswith("_s")}
    assert_equal(mine, theirs, "state")


def assert_equal(mine, theirs, where: str) -> None:
    assert type(mine) is type(theirs), where
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            assert_equal(mine[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs), where
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_equal(one, other, f"{where}[{number}]")
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), where
    else:
        assert mine == theirs, where


# --- what is left when files are damaged -----------------------------------------------------------------------------


def test_a_checkpoint_that_the_disk_damaged_is_not_used(dgpo_run, tmp_path):
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    weights = path / "checkpoints" / f"{STEPS:06d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="skipped: model.safetensors does not have the checksum it was saved with"):
        again = resume(path)
    assert f"resuming after step {STEPS - 2} of {STEPS}" in again.out
    assert_same_run(dgpo_run, again)


def without_its_last_checkpoint(run: Run, path: Path) -> Path:
    """A copy of a run that was interrupted before its end."""
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "checkpoints" / f"{STEPS:06d}")
    (path / "summary.json").unlink()
    return path


def test_what_was_read_of_a_checkpoint_is_let_go_before_training_goes_on(dgpo_run, tmp_path):
    load, spare, alive = checkpoint.load, [], []

    def with_a_spare_tensor(*args, **networks):
        state = load(*args, **networks)
        state.trainer["spare"] = torch.zeros(1)
        spare.append(weakref.ref(state.trainer["spare"]))
        return state

    def step(*_):
        alive.append(spare[0]() is not None)
        raise KeyboardInterrupt

    path = without_its_last_checkpoint(dgpo_run, tmp_path / "run")
    with patch.object(checkpoint, "load", with_a_spare_tensor), patch.object(Trainer, "_train_step", step):
        assert command(f"resume={path}").code == 130
    assert alive == [False]


def test_a_run_that_filled_its_gpu_goes_on_in_smaller_pieces(dgpo_run, tmp_path):
    """As the message about a full GPU says. Only the order of sums is another one."""
    path = without_its_last_checkpoint(dgpo_run, tmp_path / "run")
    smaller = ["learner.micro_batch_tokens=600", "learner.chunk_tokens=50", "learner.gradient_checkpointing=true"]
    again = command(f"resume={path}", *smaller)
    assert again.code == 0, again.err
    learner = Run(path).summary["config"]["learner"]
    assert [learner[each.partition("=")[0].partition(".")[2]] for each in smaller] == [600, 50, True]
    mine, theirs = Run(path).weights(STEPS), dgpo_run.weights(STEPS)
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-3
    assert any((mine[name] != dgpo_run.weights(STEPS - 2)[name]).any() for name in mine)


def test_a_run_that_never_saved_anything_begins_anew(dgpo_run, tmp_path):
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    with (path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 11, "st')  # torn
    assert_same_run(dgpo_run, resume(path))
