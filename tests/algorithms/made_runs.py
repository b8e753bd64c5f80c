"""Run directories made by hand, with known figures, for what reads finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

GROUPS = ("single_hop", "multi_hop")
CONFIG: dict[str, Any] = {
    "env": {"name": "agentic_rag", "max_turns": 4, "top_k": 3},
    "dataset": {"name": "tiny", "seed": 0},
    "retriever": {"name": "bm25", "k1": 0.9},
    "reward": {"name": "exact_match"},
    "model": {"policy": "tiny-student", "teacher": "tiny-teacher"},
    "rollout": {"temperature": 1.0},
    "evaluation": {"num_questions": None, "temperatures": [0.0, 1.0], "seed": 0},
    "num_envs": 96,
    "cache_dir": "/somewhere",
}
FINGERPRINTS = {"questions": "1a", "training_questions": "2b", "corpus": "3c", "retriever": "4d"}


def figures(right: np.ndarray, group: np.ndarray, **others: float) -> dict[str, Any]:
    """What an evaluation says of questions that were answered right or wrong."""
    rest = {"f1": 0.5, "num_searches": 2.0, "malformed_fraction": 0.125, "retriever_errors": 0, **others}

    def of(chosen: np.ndarray) -> dict[str, Any]:
        mean = float(chosen.mean())
        return {"n": len(chosen), "exact_match": mean, "exact_match_interval": [mean, mean], **rest}

    return {"all": of(right)} | {name: of(right[group == name]) for name in dict.fromkeys(group.tolist())}


def make_run(
    folder: Path,
    algo: str,
    seed: int,
    right: Mapping[str, np.ndarray],
    *,
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    costs: Mapping[str, float] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    arc: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str | None] | None = None,
    finished: bool = True,
    groups: Sequence[str] = GROUPS,
    prefix: str = "q",
) -> Path:
    """Write a run directory.

    Args:
        folder: Its place; made.
        algo: Name of the algorithm and of its only stage.
        seed: Of the run.
        right: By mode of decoding, right or wrong, [questions] bool; question i is in group i % len(groups).
        settings: Of the algorithm.
        config: Sections that differ from `CONFIG`.
        overrides: As on the command line.
        costs: As in the summary.
        metrics: Lines of `metrics.jsonl`.
        arc: As in the summary.
        fingerprints: Those that differ from `FINGERPRINTS`.
        finished: Whether there is a summary.
        groups: Of the questions; one group: none.
        prefix: Of the questions' ids.
    """
    whole = {**CONFIG, **(config or {}), "algo": {"name": algo, **(settings or {})}, "seed": seed}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if not finished:
        return folder
    group = np.array([groups[number % len(groups)] for number in range(len(next(iter(right.values()))))])
    evaluation: dict[str, Any] = {"raw": {}, algo: {}, "teacher": {}}
    (folder / "predictions").mkdir()
    for mode, answers in right.items():
        for model, shown in (("raw", np.zeros_like(answers)), (algo, answers), ("teacher", np.ones_like(answers))):
            measured = figures(shown, group)
            evaluation[model][mode] = measured if len(groups) > 1 else {"all": measured["all"]}
        lines = [
            {"question_id": f"{prefix}{number}", "dataset": str(name), "correct": bool(correct)}
            for number, (name, correct) in enumerate(zip(group, answers, strict=True))
        ]
        file = folder / "predictions" / f"test-{algo}-{mode}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "algo": algo,
        "stages": [{"name": algo, "steps": len(metrics), "checkpoint": None}],
        "seed": seed,
        "evaluation": evaluation,
        "costs": dict(costs or {}),
        "teacher_share_of_training": 0.25,
        "peak_memory_mb": 500,
        "fingerprints": FINGERPRINTS | dict(fingerprints or {}),
        "config": whole,
        "versions": {"torch": "2.0"},
        "machine": {"device": "cpu"},
    }
    (folder / "summary.json").write_text(json.dumps(summary | ({"arc": arc} if arc else {})))
    return folder


def as_evaluated(run: Path, place: str, trained: Mapping[str, Any] | None = None) -> None:
    """Turn a run directory into that of `evaluate`, which measured a checkpoint.

    Args:
        run: What `make_run` made, with the modes of decoding that are measured.
        place: Of the checkpoint.
        trained: What the summary says of its training; None: it comes from no run.
    """
    summary = json.loads((run / "summary.json").read_text())
    algo = summary["algo"]
    kept = {name: value for name, value in summary.items() if name not in ("algo", "stages", "seed")}
    kept["evaluation"] = {"checkpoint": summary["evaluation"][algo]}
    for file in (run / "predictions").iterdir():
        file.rename(file.with_name(file.name.replace(f"test-{algo}-", "test-checkpoint-")))
    config = summary["config"] | {"algo": None, "seed": 0, "model": {"policy": place, "teacher": None}}
    told = {"checkpoint": place, "split": "test", "config": config} | ({"trained": trained} if trained else {})
    (run / "summary.json").write_text(json.dumps(kept | told))
