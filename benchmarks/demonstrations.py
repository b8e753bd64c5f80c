"""Demonstrations of the scripted expert on real questions: how many it derives, and why it gives others up.

    python -m benchmarks.demonstrations questions=q.jsonl corpus=c.jsonl.gz max_turns=4

prints a row of the table in README.md. The observation budget counts with the tokenizer of the bundled student unless
`model=<folder>` names another one; no model plays.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from algorithms.learner.config import DemonstrationsConfig
from algorithms.learner.networks import load_tokenizer
from algorithms.rollout.config import RolloutConfig
from algorithms.training.build import Environments
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES, collect
from algorithms.training.model_names import resolve_model
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

GIVEN = {"num": "1000", "model": "tiny-student", "top_k": "3", "max_turns": "4", "max_observation_tokens": "500"}


def main(words: list[str]) -> None:
    """Play the first `num` questions in a drawn order, and print what became of them."""
    given = GIVEN | dict(word.split("=", 1) for word in words)
    data = {"name": "jsonl", "questions": given["questions"], "corpus": given["corpus"], "split": "all"}
    env = {name: int(given[name]) for name in ("top_k", "max_turns", "max_observation_tokens")}
    settings: Any = vars(EvaluateConfig()) | {"evaluation": {}, "num_envs": 64, "dataset": data, "env": env}
    folder = resolve_model(given["model"])
    config = evaluate_config(settings, folder, {})
    tokenizer = load_tokenizer(folder)
    envs = Environments(config, tokenizer).envs("all")
    rollout = RolloutConfig(max_new_tokens=64, max_tokens=4096)
    how = DemonstrationsConfig(source="expert")
    source = DEMONSTRATION_SOURCES.get("expert").factory(how, SimpleNamespace(tokenizer=tokenizer), envs, rollout)
    num = int(given["num"])
    made = collect(source, num, max_questions=num, seed=0)
    dropped = ", ".join(f"{reason} {count:g}" for reason, count in sorted(made.dropped.items()))
    turns = [len(one.turns) - 1 for one in made.trajectories]
    print(f"asked {made.num_asked}, derived {len(turns)}; searches {sum(turns) / max(1, len(turns)):.2f}; {dropped}")


if __name__ == "__main__":
    main(sys.argv[1:])
