"""Several processes carry out the run of one: the same weights, rollouts, schedules and figures, and one end for all.

Everything is computed in float64, where the order of sums hardly shows: whatever differs by more was done differently.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import rank_runs
import torch
from rank_processes import join, run, start, told
from safetensors.numpy import load_file
from small_runs import TINY, Run, command

from algorithms import evaluate

ROOT = Path(__file__).parents[2]
#: What the order of sums may change in a run of some steps. Most weights differ by 1e-14; Adam divides a gradient that
#: almost vanishes by its own size, and makes up to 1e-11 of it.
CLOSE = 1e-10
#: The second one lets the model read, so all processes write for it.
PROBES = "probes=[query_rewriting,source_referencing]"
SMALL = [
    *TINY, rank_runs.FLOAT64, "algo=dgpo", "num_envs=13",
    "evaluation.num_questions=7", "evaluation.num_dev_questions=5",
    "algo.batch_size=9", "algo.num_minibatches=2", "algo.steps=2", "algo.critic_warmup_steps=1", "algo.kl_coef=0.02",
    "algo.warm_start.batch_size=4", "algo.warm_start.num_demonstrations=8", "algo.warm_start.epochs=1",
    PROBES, "probe_every=2",
]  # fmt: skip
STEPS = 4


def many(count: int, folder: Path, arguments: list[str], *death: Any) -> list[int]:
    """Run a command in several processes; return their exit codes."""
    folder.mkdir(exist_ok=True)
    processes = start(count, folder, run, arguments, *death)
    join(processes, 900)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Run:
    """A run of one process, never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    done = command(*SMALL, f"hydra.run.dir={folder}", f"cache_dir={folder}/cache")
    assert done.code == 0, done.err
    return Run(folder)


def test_two_processes_make_the_run_of_one(alone, tmp_path):
    places = [f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    assert many(2, tmp_path / "err", [*SMALL, *places]) == [0, 0], told(tmp_path / "err")
    assert_same(alone.path, tmp_path / "run")
    assert told(tmp_path / "err") == []
    assert Run(tmp_path / "run").summary["machine"]["processes"] == 2


def test_two_processes_that_share_the_networks_make_the_run_of_one(alone, tmp_path):
    places = [f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    codes = many(2, tmp_path / "err", [*SMALL, "learner.sharding=fsdp2", *places])
    assert codes == [0, 0], told(tmp_path / "err")
    assert_same(alone.path, tmp_path / "run")
    # From a checkpoint of two processes, one goes on; it has nothing to share.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{STEPS:06d}")
    (tmp_path / "run" / "summary.json").unlink()
    again = command(f"resume={tmp_path}/run", f"cache_dir={tmp_path}/cache")
    assert again.code == 0, again.err
    assert_same(alone.path, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("model.lora.rank=4", [2, 1]),
        pytest.param("model.lora.rank=4", [3, 2], marks=pytest.mark.nightly),
        # Three processes share out no size of the student evenly: 749 tokens, widths of 64 and 256.
        pytest.param("learner.sharding=fsdp2", [3, 2, 1], marks=pytest.mark.nightly),
    ],
)
def test_adapters_and_shares_go_on_in_another_number_of_processes(tmp_path, setting, counts):
    """From the middle of the second stage, where policy, critic and both optimizers have moved."""
    small = [*SMALL, "algo.steps=3", "checkpoint_every=1", f"cache_dir={tmp_path}/cache", setting]
    assert many(1, tmp_path / "err", [*small, f"hydra.run.dir={tmp_path}/alone"]) == [0], told(tmp_path / "err")
    path = tmp_path / "run"
    for count in counts:
        if path.exists():
            shutil.rmtree(path / "checkpoints" / f"{STEPS + 1:06d}")
            (path / "summary.json").unlink()
        arguments = [f"resume={path}"] if path.exists() else [*small, f"hydra.run.dir={path}"]
        assert many(count, tmp_path / "err", arguments) == [0] * count, told(tmp_path / "err")
        assert Run(path).summary["machine"]["processes"] == count
        print(f"{setting}, {count} processes: weights differ by {assert_same(tmp_path / 'alone', path):.1e}")


def evaluated(*arguments: str) -> None:
    """`python -m algorithms.evaluate` in one of the processes."""
    with patch.object(sys, "argv", ["evaluate", *arguments]):
        evaluate.main()


def test_two_processes_evaluate_as_one(alone, tmp_path):
    given = [f"checkpoint={alone.path}", f"hydra.run.dir={tmp_path}/score", f"cache_dir={tmp_path}/cache"]
    processes = start(2, tmp_path, evaluated, *given, PROBES)
    join(processes, 300)
    assert [process.exitcode for process in processes] == [0, 0], told(tmp_path)
    for name, key in {"evaluation": "dgpo", "arc": "dgpo"}.items():
        found, expected = (without_clocks(run.summary[name]) for run in (Run(tmp_path / "score"), alone))
        assert differences(found, {"checkpoint": expected[key]}) < 1e-12, name


def run_where_one_is_not_answered(arguments: list[str]) -> int:
    """A run whose second process gets no answer from the search service as to what it searches."""
    module = "algorithms.training.evaluation_cache"
    answer = {} if os.environ["RANK"] == "0" else {"of_retriever": lambda retriever: None}
    with patch.multiple(module, **answer) if answer else contextlib.nullcontext():
        return run(arguments)


def test_a_run_ends_where_a_search_service_answers_one_process_alone(tmp_path):
    small = [*TINY, "algo=sft", "algo.num_demonstrations=8", "algo.batch_size=8", "algo.epochs=1", "probes=[]"]
    places = [f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    processes = start(2, tmp_path, run_where_one_is_not_answered, [*small, "evaluation.num_questions=6", *places])
    join(processes, 120)
    assert [process.exitcode for process in processes] == [0, 0], told(tmp_path)
    kept = list((tmp_path / "cache" / "evaluations").glob("*/greedy.jsonl.gz"))
    assert len(kept) == 2, "of the raw model and of the teacher"


def test_a_mistake_in_the_command_line_is_told_once(tmp_path):
    codes = many(2, tmp_path / "err", ["algo=dpgo", f"hydra.run.dir={tmp_path}/run"])
    assert codes == [1, 0]
    assert len(told(tmp_path / "err")) == 1
    assert "Did you mean 'dgpo'?" in told(tmp_path / "err")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("work", [run, evaluated])
def test_a_multirun_in_several_processes_is_refused_at_once(tmp_path, work):
    where = f"hydra.sweep.dir={tmp_path}/sweep"
    given = {run: [["-m", "hydra/launcher=basic", "seed=0,1", where]], evaluated: ["-m", "num_envs=1,2", where]}
    processes = start(2, tmp_path, work, *given[work])
    join(processes, 120)
    assert [process.exitcode for process in processes] == [1, 0], told(tmp_path)
    (line,) = told(tmp_path)
    assert line.startswith("ConfigurationError: a multirun is started without torchrun; ")
    assert not (tmp_path / "sweep").exists()


def differences(first: Any, second: Any, where: str = "") -> float:
    """The largest difference between numbers of two pieces of plain data that must be the same otherwise."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        return max((differences(first[name], second[name], f"{where}.{name}") for name in first), default=0.0)
    if isinstance(first, list):
        assert len(first) == len(second), where
        return max((differences(*pair, where) for pair in zip(first, second, strict=True)), default=0.0)
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second)
    assert first == second, where
    return 0.0


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not name.startswith("time/") and not name.endswith("_s")}
        return {name: without_clocks(item) for name, item in kept.items()}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """What was trained: the policy or its adapter, and the critic or its adapter."""
    (file,) = checkpoint.glob("*model.safetensors")
    critic = torch.load(checkpoint / "training_state.pt", weights_only=True)["critic"] or {}
    return load_file(file) | {f"critic.{name}": value.numpy() for name, value in critic.items()}


def assert_same(first: Path, second: Path) -> float:
    """Compare two runs in float64; return the largest difference of weights."""
    steps = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (first, second)]
    assert steps[0] == steps[1]
    worst = 0.0
    for step in steps[0]:
        mine, theirs = (weights(run / "checkpoints" / step) for run in (first, second))
        assert mine.keys() == theirs.keys()
        assert {values.dtype for values in mine.values()} == {np.dtype("float64")}
        worst = max(worst, *(float(np.abs(mine[name] - theirs[name]).max()) for name in mine))
    assert worst < CLOSE
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)]
    assert differences(*map(without_clocks, rows)) < 1e-8  # the smallest figures are divided by smaller ones
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for name in ("stages", "evaluation", "arc", "gain", "demonstrations", "costs", "teacher_share_of_training"):
        assert differences(*(without_clocks(summary[name]) for summary in summaries)) < 1e-12, name
    names = [sorted(path.name for path in (run / "trajectories").iterdir()) for run in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        episodes = [
            [json.loads(line) for line in gzip.decompress((run / "trajectories" / name).read_bytes()).splitlines()]
            for run in (first, second)
        ]
        assert differences(*episodes) < 1e-7, name
    return worst


# --- every algorithm, and every end ----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_every_algorithm_in_one_two_and_three_processes(tmp_path):
    for count in (1, 2, 3):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        work = [*start, "tests/algorithms/rank_runs.py", str(tmp_path / str(count)), *rank_runs.RUNS]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(work, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in rank_runs.RUNS:
        if name == "maskable_ppo":  # no language model; its learner is that of one process
            continue
        for count in (2, 3):
            print(name, count, assert_same(tmp_path / "1" / name, tmp_path / str(count) / name))


#: Which of three processes ends, at which call of what.
DEATHS = {
    "while demonstrations are played": (2, "algorithms.rollout.player._Rollout._step", 2, signal.SIGKILL),
    "before gradients are summed": (1, "algorithms.learner.ranks.sum_gradients", 2, signal.SIGKILL),
    "in the middle of a rollout": (2, "algorithms.training.batches.Sources.played", 2, signal.SIGKILL),
    "while a checkpoint is written": (0, "algorithms.training.checkpoint.sync_all", 2, signal.SIGKILL),
    "while probes are asked": (0, "algorithms.rollout.generator.Generator.answer", 1, signal.SIGKILL),
    "stopped before a sum": (1, "algorithms.learner.ranks.summed", 9, signal.SIGSTOP),
    "stopped, the one that writes": (0, "algorithms.training.trainer.write_check", 2, signal.SIGSTOP),
    "an error of one": (2, "algorithms.training.batches.Sources.played", 1, "the disk is gone"),
}


@pytest.mark.parametrize("moment", DEATHS)
def test_the_place_of_each_death_exists(moment):
    pkgutil.resolve_name(DEATHS[moment][1])


@pytest.mark.nightly
@pytest.mark.parametrize("moment", DEATHS)
def test_when_one_of_three_ends_all_end_and_two_go_on(alone, tmp_path, moment):
    path, noted = tmp_path / "run", tmp_path / "died"
    begin = [*SMALL, f"hydra.run.dir={path}", f"cache_dir={tmp_path}/cache"]
    codes = many(3, tmp_path / "err", begin, noted, *DEATHS[moment])
    assert noted.exists(), (codes, told(tmp_path / "err"))
    took = time.time() - float(noted.read_text())
    print(f"{moment}: all ended after {took:.1f} s")
    assert all(codes), (codes, told(tmp_path / "err"))
    assert took < 10
    lines = told(tmp_path / "err")
    expected = "OSError: the disk is gone" if moment == "an error of one" else f"Process {DEATHS[moment][0]} of 3"
    assert [line.startswith(expected) for line in lines if "Checkpoints are kept. To go on" not in line] == [True]

    begun = (path / ".hydra" / "config.yaml").exists() and (path / "metrics.jsonl").exists()
    assert many(2, tmp_path / "again", [f"resume={path}"] if begun else begin) == [0, 0], told(tmp_path / "again")
    print(f"{moment}: weights differ by {assert_same(alone.path, path):.1e}")


# --- several machines ------------------------------------------------------------------------------------------------


def slurm_script() -> str:
    """The script as the README has it."""
    page = (ROOT / "algorithms" / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, flags=re.DOTALL)
    return script


def test_the_script_for_slurm_is_one():
    checked = subprocess.run(["bash", "-n"], input=slurm_script(), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.nightly
def test_two_machines_make_the_run_of_one(alone, tmp_path):
    """The script runs as it stands; `srun` and `scontrol` pretend that this machine is two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "many.sh").write_text(slurm_script().replace("29500", str(port)))
    tools = {
        "scontrol": "echo 127.0.0.1; echo 127.0.0.1",
        "srun": 'shift; "$@" & first=$!; "$@" & second=$!; wait $first && wait $second',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7"}
    arguments = [*SMALL, f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    done = subprocess.run(
        ["bash", str(tmp_path / "many.sh"), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").summary["machine"]["processes"] == 2
    assert_same(alone.path, tmp_path / "run")
