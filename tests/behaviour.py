"""Hashes of what small runs learn: `python tests/behaviour.py [checkout]`.

The same hashes at two commits mean that no behaviour moved between them: weights of the last checkpoint, figures of
every step, evaluation and probes are equal bit for bit, clocks aside. The script knows the project by its command line
and the files of a run directory only, so it runs on any commit; it is a tool, not a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

COMMON = [
    "seed=3", "threads=1", "num_envs=16", "dataset.num_passages=150", "dataset.num_questions=60",
    "rollout.max_new_tokens=24", "rollout.max_tokens=512", "env.max_turns=2",
    "evaluation.num_questions=24", "evaluation.every=2", "evaluation.num_dev_questions=8",
]  # fmt: skip
WARM_START = [f"algo.warm_start.{setting}" for setting in ("batch_size=8", "num_demonstrations=24", "epochs=4")]
RUNS = {
    "dgpo": [*WARM_START, "algo.batch_size=16", "algo.num_minibatches=2", "algo.steps=4",
             "algo.critic_warmup_steps=1", "algo.kl_coef=0.02", "algo.gae_lambda=0.9"],
    "gkd": [*WARM_START, "algo.num_demonstrations=24", "algo.batch_size=8", "algo.epochs=2"],
    "grpo": ["+algo@algo.warm_start=sft", *WARM_START, "algo.batch_size=16", "algo.num_minibatches=2",
             "algo.rollouts_per_prompt=4", "algo.steps=3"],
    "maskable_ppo": ["algo.total_env_steps=1600", "algo.turns_per_update=20"],
}  # fmt: skip

#: Figures that came, went or got another name after the first commit to be compared; they are left out, so that its
#: hashes still serve.
_ENDINGS = [f"{ending}_fraction" for ending in ("out_of_turns", "out_of_tokens", "search_failed")]
_GAPS = {"train/sampler_drift", "rollout/logprob_gap_mean", "rollout/logprob_gap_max"}
LATER = {*_ENDINGS, *_GAPS, "rollout/answered_fraction", *(f"rollout/{name}" for name in _ENDINGS)}


def main() -> None:
    """Run and hash, in the checkout that is named or in the working directory."""
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    digests = {}
    with tempfile.TemporaryDirectory() as folder:
        for algorithm, settings in RUNS.items():
            run_dir = Path(folder) / algorithm
            command = [sys.executable, "-m", "algorithms.run", f"algo={algorithm}", *COMMON, *settings]
            command += [f"hydra.run.dir={run_dir}", f"cache_dir={folder}/cache"]
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
            digests[algorithm] = digest(run_dir)
            print(algorithm, digests[algorithm], flush=True)
    print("all", hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16])


def digest(run_dir: Path) -> str:
    """What a run has learned and measured, as 16 hexadecimal digits for weights and 16 for figures."""
    last = max((run_dir / "checkpoints").iterdir())
    weights = hashlib.sha256()
    for file in sorted(last.rglob("*.safetensors")):
        for name, values in sorted(load_file(file).items()):
            weights.update(name.encode() + str(values.dtype).encode() + values.tobytes())
    for file in sorted(last.rglob("*.zip")):  # a controller of Stable-Baselines3 has no safetensors; its name counts
        weights.update(file.name.encode())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    measured = {name: summary.get(name) for name in ("evaluation", "arc")}
    figures = json.dumps([without_clocks(rows), without_clocks(measured)], sort_keys=True)
    return f"{weights.hexdigest()[:16]} {hashlib.sha256(figures.encode()).hexdigest()[:16]}"


def without_clocks(value: Any) -> Any:
    """The same without what a clock has measured, and without `LATER`."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not name.startswith("time/") and not name.endswith("_s")}
        kept = {name: item for name, item in kept.items() if name not in LATER}
        return {name: without_clocks(item) for name, item in kept.items()}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
