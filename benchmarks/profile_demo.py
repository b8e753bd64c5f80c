"""Where the processor time of the main job goes: `python benchmarks/profile_demo.py [checkout] [setting=value ...]`.

The job is that of `demo_job.txt`; further settings change it, as in `algo.steps=6 algo.warm_start.epochs=2
evaluation.num_questions=48 evaluation.every=0`, which takes a minute. The script prints processor seconds by phase,
where a phase leaves out the phases within it. Then it prints the floor: what the matrix products and attention of the
student alone take on this machine. Processor time is what to compare on a shared machine.

Run it for two checkouts at the same time, so that both suffer from the same neighbours. The phases are functions of the
learner and the player. One that a checkout does not have is left out of the table, and its time counts to the phase
around it.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB = Path(__file__).with_name("demo_job.txt")
PHASES = {
    "algorithms.training.trainer:Trainer.train": "training, the rest",
    "algorithms.training.trainer:Trainer.__init__": "loading",
    "algorithms.training.trainer:Trainer._check_on_dev": "checks on the dev split, the rest",
    "algorithms.training.trainer:Trainer._save": "checkpoints",
    "algorithms.training.batches:Sources.__init__": "demonstrations, the rest",
    "algorithms.training.summary:finish": "evaluation, the rest",
    "algorithms.training.evaluation:run_probes": "probes, the rest",
    "algorithms.rollout.player:Player.rollout": "rollouts: environment and records",
    "algorithms.rollout.cached_engine:CachedEngine.write": "rollouts: engine, the rest",
    "algorithms.rollout.cached_engine:CachedEngine._read_pending": "rollouts: engine, reading texts",
    "algorithms.rollout.cached_engine:CachedEngine._decode": "rollouts: engine, token by token",
    "algorithms.learner.training_step:Learner.score": "scoring",
    "algorithms.training.trainer:Trainer._keep_teacher_states": "scoring",
    "algorithms.learner.training_step:Learner.update": "update, the rest",
    "algorithms.learner.training_step:Learner._policy_backward": "update: policy, forward and backward",
    "algorithms.learner.training_step:Learner._critic_backward": "update: critic, forward and backward",
    "algorithms.learner.optimizer:Optimizer.apply": "update: optimizer",
    # The names up to 8077860.
    "algorithms.learner.trainer:Trainer.train": "training, the rest",
    "algorithms.learner.trainer:Trainer.__init__": "loading",
    "algorithms.learner.sources:Sources.__init__": "demonstrations, the rest",
    "algorithms.learner.report:finish": "evaluation, the rest",
    "algorithms.learner.rollout:RolloutEngine.rollout": "rollouts: environment and records",
    "algorithms.learner.rollout:_Rollout._decode": "rollouts: engine, token by token",
    "algorithms.learner.rollout:_Rollout._prefill": "rollouts: engine, reading texts",
    "algorithms.learner.generation:Generator.__call__": "probes, the rest",
    "algorithms.learner.learner:Learner.score": "scoring",
    "algorithms.learner.learner:Learner.update": "update, the rest",
    "algorithms.learner.learner:Learner._policy_backward": "update: policy, forward and backward",
    "algorithms.learner.learner:Learner._critic_backward": "update: critic, forward and backward",
}


class Clock:
    """Processor seconds and calls by phase; the time of a phase within another one counts to the inner one only."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = []

    def watch(self, place: str, phase: str) -> None:
        """Measure a function from now on, if this checkout has it."""
        module_name, names = place.split(":")
        *owners, name = names.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for each in owners:
                owner = getattr(owner, each)
            function = getattr(owner, name)
        except (ImportError, AttributeError):
            return
        setattr(owner, name, self._measured(function, phase))

    def _measured(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def measured(*args: Any, **settings: Any) -> Any:
            started = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **settings)
            finally:
                spent = time.process_time() - started
                self.seconds[phase] += spent - self._inner.pop()
                self.calls[phase] += 1
                if self._inner:
                    self._inner[-1] += spent

        return measured


def floor_per_token(length: int = 160) -> float:
    """Microseconds per token of the student's matrix products and attention alone, forward and backward."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention
    from transformers import AutoModelForCausalLM

    from algorithms.assets import ASSETS

    backbone: Any = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-student").base_model
    weights = [p for name, p in backbone.layers.named_parameters() if p.dim() == 2]
    rows, heads = 12, backbone.config.num_attention_heads
    inputs = {w.shape[1]: torch.randn(rows * length, w.shape[1], requires_grad=True) for w in weights}
    queries = torch.randn(rows, heads, length, backbone.config.hidden_size // heads, requires_grad=True)

    def work() -> None:
        for weight in weights:
            output = linear(inputs[weight.shape[1]], weight)
            output.backward(output.detach())
        for _ in backbone.layers:
            output = scaled_dot_product_attention(queries, queries, queries, is_causal=True)
            output.backward(output.detach())

    times = []
    for _ in range(10):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times) / (rows * length) * 1e6


def main() -> None:
    """Run the job and print the table."""
    arguments = sys.argv[1:]
    checkout = Path(arguments.pop(0) if arguments and "=" not in arguments[0] else ".").resolve()
    sys.path.insert(0, str(checkout))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines = JOB.read_text(encoding="utf-8").splitlines()
    job = [line for line in lines if line and not line.startswith("#")]
    changed = {argument.partition("=")[0] for argument in arguments}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        command = [line for line in job if line.partition("=")[0] not in changed] + arguments
        sys.argv = ["run", *command, "threads=1", f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache"]
        started = time.process_time()
        run = importlib.import_module("algorithms.run")
        for place, phase in PHASES.items():
            clock.watch(place, phase)
        run.main()
    total, loaded = time.process_time() - started, Path(run.__file__).parents[1]
    print(f"\nprocessor seconds by phase, one thread, {loaded}")
    for phase, seconds in clock.seconds.most_common():
        print(f"{phase:45s} {seconds:8.2f} {clock.calls[phase]:8d} calls")
    print(f"{'imports and all that is not listed':45s} {total - sum(clock.seconds.values()):8.2f}")
    print(f"{'sum':45s} {total:8.2f}")
    print(f"floor of the update: {floor_per_token():.1f} microseconds per token and network (products and attention)")


if __name__ == "__main__":
    main()
