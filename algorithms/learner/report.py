"""The end of a run: every model measured on the same test questions, a table, a transcript and `summary.json`."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from algorithms.learner import evaluation
from algorithms.learner.metrics import printable
from algorithms.learner.models import load_model
from algorithms.learner.parts import resolve_model, stage_name
from algorithms.learner.trainer import Trainer
from algorithms.learner.trajectories import transcript, write_trajectories
from algorithms.learner.types import Trajectory

_PACKAGES = ("torch", "transformers", "gymnasium", "bm25s", "hydra-core", "agentic-rag-env")


@dataclass
class Evaluated:
    """A model on the test questions.

    Attributes:
        name: "raw", the name of a training stage, or "teacher".
        trajectories: By temperature.
        figures: `evaluation.measure` by temperature.
        teacher_in_memory: Whether a teacher network existed at the time, beside or as the model measured.
    """

    name: str
    trajectories: dict[float, list[Trajectory]]
    figures: dict[float, dict[str, Any]]
    teacher_in_memory: bool


def finish(trainer: Trainer) -> dict[str, Any]:
    """Evaluate, print and write everything; returns the summary.

    The policy's models are measured before the teacher is loaded again to be measured itself.
    """
    started = time.perf_counter()
    models = _models(trainer)
    evaluated = [evaluate_model(trainer, name, model) for name, model in models]
    trainer.position.spend(evaluation_s=time.perf_counter() - started)
    summary = _summary(trainer, evaluated)
    (trainer.run_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    _log(trainer, summary)
    console = Console(width=None if sys.stdout.isatty() else 120)
    show(console, trainer, evaluated, summary)
    return summary


def _models(trainer: Trainer) -> Iterator[tuple[str, PreTrainedModel]]:
    """The raw policy, the policy after each stage, and the teacher, one in memory at a time."""
    networks, config = trainer.networks, trainer.config
    paths = [("raw", resolve_model(config.model.policy))]
    starts = trainer.position.stage_starts
    for stage, step in zip(trainer.stages, starts[1:], strict=False):
        paths.append((stage_name(stage), str(trainer.checkpoint_path(step))))
    for name, path in paths:
        yield name, load_model(path, device=networks.device)
    if config.model.teacher is not None:
        yield "teacher", networks.teacher()
        networks.release_teacher()


def evaluate_model(trainer: Trainer, name: str, model: PreTrainedModel) -> Evaluated:
    """Play the test questions in every mode of decoding, and keep all transcripts."""
    config, networks = trainer.config.evaluation, trainer.networks
    envs = trainer.environments.envs("test")
    count = min(config.num_questions or len(envs.dataset), len(envs.dataset))
    result = Evaluated(name, {}, {}, networks.teacher_in_memory())
    for temperature in track(config.temperatures, f"evaluating {name}", transient=True):
        engine = networks.engine(model, envs, temperature=temperature)
        trajectories, _ = engine.rollout(range(count), seed=(config.seed, 1))
        result.trajectories[temperature] = trajectories
        result.figures[temperature] = evaluation.measure(trajectories, envs.dataset, config.seed)
        path = trainer.run_dir / "trajectories" / f"test-{name}-{_mode(temperature)}.jsonl.gz"
        write_trajectories(path, trajectories, networks.tokenizer)
    return result


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def _summary(trainer: Trainer, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    config, position = trainer.config, trainer.position
    final, first = _final(trainer, evaluated), evaluated[0]
    before = evaluated[evaluated.index(final) - 1] if len(trainer.stages) > 1 else first
    gains = {}
    for temperature in config.evaluation.temperatures:
        difference, bounds = evaluation.gain(
            final.trajectories[temperature], before.trajectories[temperature], config.evaluation.seed
        )
        gains[_mode(temperature)] = {"over": before.name, "exact_match": difference, "interval": bounds}
    return {
        "algo": stage_name(trainer.stages[-1]),
        "stages": [
            {"name": stage_name(stage), "steps": end - start, "checkpoint": f"checkpoints/{end:06d}"}
            for stage, start, end in zip(
                trainer.stages, position.stage_starts, position.stage_starts[1:], strict=False
            )
        ],
        "seed": config.seed,
        "evaluation": {
            model.name: {_mode(temperature): figures for temperature, figures in model.figures.items()}
            for model in evaluated
        },
        "gain": gains,
        "teacher_in_memory_during_policy_evaluation": any(
            model.teacher_in_memory for model in evaluated if model.name != "teacher"
        ),
        "num_demonstrations": len(trainer.sources.demonstrations),
        "costs": {name: round(cost, 3) for name, cost in sorted(position.costs.items())},
        "teacher_share_of_training": _teacher_share(position.costs),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "kl_estimator": getattr(trainer.stages[-1].config, "kl_estimator", None),
        "config": asdict(config),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"device": str(trainer.networks.device), "processor": platform.machine()},
    }


def _final(trainer: Trainer, evaluated: Sequence[Evaluated]) -> Evaluated:
    """The policy after the last stage: the last model, or the one before the teacher."""
    return evaluated[-2] if evaluated[-1].name == "teacher" else evaluated[-1]


def _teacher_share(costs: Mapping[str, float]) -> float:
    """Tokens that went through the teacher over all tokens of training, sampled and trained."""
    of_teacher = costs.get("teacher_sampled_tokens", 0.0) + costs.get("teacher_scored_tokens", 0.0)
    of_policy = costs.get("sampled_tokens", 0.0) + costs.get("trained_tokens", 0.0)
    return of_teacher / (of_teacher + of_policy) if of_teacher + of_policy else 0.0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _log(trainer: Trainer, summary: Mapping[str, Any]) -> None:
    """Put the final figures and the settings into TensorBoard."""
    final = summary["stages"][-1]["name"]
    step = trainer.position.stage_starts[-1]
    with_groups = {
        f"eval/{group}/exact_match" + ("" if mode == "greedy" else f"/{mode}"): figures["exact_match"]
        for mode, groups in summary["evaluation"][final].items()
        for group, figures in groups.items()
    }
    with SummaryWriter(str(trainer.run_dir / "tb")) as writer:
        for name, value in with_groups.items():
            writer.add_scalar(name, value, step)


def show(console: Console, trainer: Trainer, evaluated: Sequence[Evaluated], summary: Mapping[str, Any]) -> None:
    """Print the table of results and one whole episode of the trained policy."""
    console.print(_table(trainer, evaluated))
    for mode, gained in summary["gain"].items():
        low, high = gained["interval"]
        console.print(
            f"gain over {gained['over']}, {mode}: {gained['exact_match']:+.3f}  (95 % interval {low:+.3f} to {high:+.3f})"
        )
    final = _final(trainer, evaluated)
    trajectories = next(iter(final.trajectories.values()))
    shown = next((t for t in trajectories if t.correct and len(t.turns) > 2), trajectories[0])
    console.rule(f"a test episode of the policy after {final.name}: {'right' if shown.correct else 'wrong'}")
    console.print(printable(transcript(shown, trainer.networks.tokenizer)), markup=False, highlight=False)
    console.rule()
    console.print(f"run directory: {trainer.run_dir}", soft_wrap=True)
    console.print(f"curves:        tensorboard --logdir {trainer.run_dir / 'tb'}", soft_wrap=True)


def _table(trainer: Trainer, evaluated: Sequence[Evaluated]) -> Table:
    figures = next(iter(evaluated[0].figures.values()))
    table = Table(title=f"exact match on {figures['all']['n']} test questions, 95 % bootstrap intervals")
    table.add_column("model")
    temperatures = trainer.config.evaluation.temperatures
    for temperature in temperatures:
        for group in figures:
            table.add_column(f"{group}\n{_mode(temperature)}", justify="center")
    for name in ("searches", "malformed"):
        table.add_column(f"{name}\n{_mode(temperatures[-1])}", justify="right")
    for model in evaluated:
        cells = [
            f"{values['exact_match']:.3f}\n{values['exact_match_interval'][0]:.2f}-{values['exact_match_interval'][1]:.2f}"
            for temperature in temperatures
            for values in model.figures[temperature].values()
        ]
        whole = model.figures[temperatures[-1]]["all"]
        table.add_row(model.name, *cells, f"{whole['num_searches']:.2f}", f"{whole['malformed_fraction']:.1%}")
        table.add_section()
    return table

