"""Two processes with a thread each against one with two threads: `pytest -m nightly benchmarks/test_processes.py -s`.

With SMOLLM2=<folder> of SmolLM2-135M, a step of that model is measured too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOLLM2 = os.environ.get("SMOLLM2")
SETTINGS = {
    "dgpo": [
        "algo=dgpo", "num_envs=48", "evaluation.num_questions=192", "evaluation.every=0", "probes=[]",
        "dataset.num_passages=300", "dataset.num_questions=200", "rollout.max_new_tokens=48",
        "algo.batch_size=96", "algo.steps=6", "algo.critic_warmup_steps=1", "checkpoint_every=100",
        "algo.warm_start.batch_size=32", "algo.warm_start.num_demonstrations=64", "algo.warm_start.epochs=4",
    ],
    "smollm2": [
        "algo=sft", "model=smollm2_135m", f"model.policy={SMOLLM2}", "dataset=nq_mini", "env.max_turns=2", "num_envs=8",
        "algo.demonstrations.source=expert", "algo.num_demonstrations=32", "algo.batch_size=16", "algo.epochs=1",
        "evaluation.num_questions=8", "evaluation.every=0", "evaluation.temperatures=[0]", "probes=[]",
    ],
}  # fmt: skip
#: The times that processes can share; the rest is loading, which each does for itself.
SHARED = ("rollout_s", "score_s", "update_s", "evaluation_s", "demonstrations_s")
GOAL = 0.75


def seconds(settings: list[str], folder: Path, processes: int, threads: int) -> dict[str, float]:
    """Times of a whole run by their names in the summary."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    places = [f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache", f"threads={threads}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [*start, "-m", "algorithms.run", *settings, *places]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    costs = json.loads((folder / "run" / "summary.json").read_text())["costs"]
    return {name: costs[name] for name in SHARED if costs.get(name, 0) > 0}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_faster_than_two_threads(tmp_path, name):
    if name == "smollm2" and SMOLLM2 is None:
        pytest.skip("SMOLLM2 names no folder")
    threads, processes = [], []
    for attempt in range(2):  # in turn, so that a machine that slows down slows both
        threads.append(seconds(SETTINGS[name], tmp_path / f"threads-{attempt}", 1, 2))
        processes.append(seconds(SETTINGS[name], tmp_path / f"processes-{attempt}", 2, 1))
    best = [{part: min(run[part] for run in runs) for part in runs[0]} for runs in (threads, processes)]
    ratio = sum(best[1].values()) / sum(best[0].values())
    load = os.getloadavg()[0]
    print(f"\n{name}, one process, two threads: {best[0]}\ntwo processes, a thread each: {best[1]}")
    print(f"ratio {ratio:.2f}, goal at most {GOAL}; load of the machine {load:.1f} on {os.cpu_count()} cores")
    assert ratio < 1 or load > 2 * (os.cpu_count() or 1), "several processes must not be slower"
