"""Kept files that are shortened, or in which a bit flips: a cache is made again, a checkpoint is refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from small_runs import DGPO_STEPS, KD_STEPS, Run, assert_same_training, command

STEPS = KD_STEPS + DGPO_STEPS


def damage(file: Path, draw: random.Random) -> str:
    """Cut a file somewhere, or flip one of its bits."""
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.5:
        file.write_bytes(content[:at])
        return f"{file.name} cut to {at} of {len(content)} bytes"
    content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{file.name}, bit flipped in byte {at}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "attempt", [*range(3), *(pytest.param(number, marks=pytest.mark.nightly) for number in range(3, 100))]
)
def test_a_damaged_file_costs_work_and_never_the_result(dgpo_run, cache, tmp_path, attempt):
    draw = random.Random(attempt)
    run, own_cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(dgpo_run.path, run)
    shutil.copytree(cache, own_cache)
    shutil.rmtree(run / "checkpoints" / f"{STEPS:06d}")  # the last steps and the evaluation are to be done again
    (run / "summary.json").unlink()
    kinds = [
        list(own_cache.rglob("demonstrations/*.jsonl.gz*")),
        list(own_cache.rglob("evaluations/*/*")),
        list((run / "checkpoints").rglob("*.*")),
        [run / "metrics.jsonl", run / ".hydra" / "config.yaml"],
    ]
    files = sorted(file for file in kinds[attempt % len(kinds)] if file.is_file() and file.stat().st_size)
    harmed = draw.choice(files)
    what = damage(harmed, draw)
    again = command(f"resume={run}", f"cache_dir={own_cache}")
    if again.code == 0:
        same = Run(run)
        if harmed.name != "metrics.jsonl":
            assert_same_training(dgpo_run, same)
        assert same.summary["evaluation"] == dgpo_run.summary["evaluation"], what
        return
    # A refusal is of a checkpoint or of settings, names the file or its folder, and says how to go on.
    assert harmed.is_relative_to(run / "checkpoints") or harmed.name == "config.yaml", (what, again.err)
    assert "Traceback" not in again.err
    assert str(run) in again.err or "lacks" in again.err, (what, again.err)
