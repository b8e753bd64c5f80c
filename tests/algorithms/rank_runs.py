"""Small runs in one or several processes: `torchrun --nproc-per-node N tests/algorithms/rank_runs.py FOLDER NAME...`.

Each run goes to `FOLDER/NAME`. All runs share the processes, because starting these takes longer than the runs.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from hydra import compose, initialize_config_module

import algorithms.run
from algorithms.learner import ranks
from algorithms.training.run_files import CONFIG_FILE, plain_data, write_settings
from algorithms.training.typed import run_config

FLOAT64 = "learner.precision=float64"
#: 21 episodes in a rollout, 11 and 10 trajectories in a minibatch, 7 questions in a check: neither 2 nor 3 divides all.
COMMON = [
    FLOAT64, "threads=1", "num_envs=13", "checkpoint_every=100", "dataset.num_passages=150", "dataset.num_questions=60",
    "rollout.max_new_tokens=24", "rollout.max_tokens=512", "env.max_turns=2", "learner.micro_batch_tokens=1500",
    "evaluation.num_questions=11", "evaluation.every=2", "evaluation.num_dev_questions=7", "probe_every=2",
    "probes=[query_rewriting,source_referencing]",
]  # fmt: skip
WARM_START = [f"algo.warm_start.{each}" for each in ("batch_size=5", "num_demonstrations=16", "epochs=1")]
DISTILLED = ["algo.batch_size=5", "algo.num_demonstrations=16", "algo.epochs=1"]
PLAYED = ["algo.batch_size=21", "algo.num_minibatches=2", "algo.steps=3"]
#: A policy that earns rewards, and a teacher that is another: where there is nothing to learn, Adam enlarges rounding.
PLAYED += ["model.policy=tiny-teacher", "model.teacher_temperature=1.5"]
CRITIC = [*PLAYED, "algo.critic_warmup_steps=1", "algo.kl_coef=0.02"]
RUNS = {
    "sft": ["algo=sft", *DISTILLED],
    "kd": ["algo=kd", *DISTILLED],
    "taid": ["algo=taid", *DISTILLED],
    "gkd": ["algo=gkd", *WARM_START, *DISTILLED],
    "distillm": ["algo=distillm", *WARM_START, "algo.batch_size=5", "algo.num_demonstrations=26", "algo.epochs=4",
                 "algo.num_validation=11", "algo.tolerance=0", "algo.share_increment=0.4"],
    "grpo": ["algo=grpo", "algo@algo.warm_start=sft", *WARM_START, *PLAYED, "algo.batch_size=20",
             "algo.rollouts_per_prompt=4"],
    "dgpo_grpo": ["algo=dgpo_grpo", *WARM_START, *PLAYED, "algo.batch_size=20", "algo.rollouts_per_prompt=4"],
    "ppo": ["algo=ppo", *CRITIC],
    "ppo_shared": ["algo=ppo", "algo.warm_start=null", "learner.critic=shared", *CRITIC],
    "sft_ppo": ["algo=sft_ppo", *WARM_START, *CRITIC],
    "dgpo": ["algo=dgpo", *WARM_START, *CRITIC, "algo.gae_lambda=0.9"],
    "lora": ["algo=sft_ppo", *WARM_START, *CRITIC, "model.lora.rank=4"],
    "maskable_ppo": ["algo=maskable_ppo", "algo.total_env_steps=400", "algo.turns_per_update=20"],
}  # fmt: skip


def main(folder: Path, names: list[str], more: list[str]) -> None:
    """Carry out runs, one after the other."""
    ranks.join()
    if not ranks.is_first():
        warnings.simplefilter("ignore")
    for name in names:
        with initialize_config_module("conf", version_base="1.3"):
            composed = compose("config", [*RUNS[name], *COMMON, f"cache_dir={folder}/cache", *more])
        config = run_config(composed)
        if ranks.is_first():
            (folder / name / CONFIG_FILE).parent.mkdir(parents=True, exist_ok=True)
            write_settings(folder / name, plain_data(config))
        algorithms.run.run(config, folder / name)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [each for each in sys.argv[2:] if "=" not in each], [e for e in sys.argv[2:] if "=" in e])
