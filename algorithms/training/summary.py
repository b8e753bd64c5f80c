"""The end of a run: every model measured on the same test questions, a table, a transcript and `summary.json`."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.terminal import printable
from algorithms.learner import ranks
from algorithms.learner.config import PolicyGradientConfig
from algorithms.learner.types import Trajectory
from algorithms.rollout.trajectory_files import transcript
from algorithms.training import checkpoint, evaluation
from algorithms.training.arc_table import show_arc
from algorithms.training.build import Environments
from algorithms.training.checkpoint import checkpoint_name
from algorithms.training.costs import speeds, spend, timed
from algorithms.training.evaluation import Evaluated, mode_name
from algorithms.training.evaluation_cache import place
from algorithms.training.file_locks import exclusively
from algorithms.training.fingerprints import fingerprints, versions
from algorithms.training.host_memory import peak_memory
from algorithms.training.run_files import METRICS_FILE, write_summary
from algorithms.training.run_logger import write_results
from algorithms.training.settings import RunConfig, settings_without_effect
from algorithms.training.trainer import Trainer


def finish(trainer: Trainer) -> dict[str, Any]:
    """Evaluate, print and write everything, and return the summary.

    The policy's models are measured before the teacher is loaded again to be measured itself. Other runs measure every
    model but the trained one alike, so it is measured once and kept under `cache_dir`. Results of the trained one are
    kept in the run directory until all are there, for a run that is killed meanwhile.
    """
    costs = trainer.position.costs
    with timed(costs, "evaluation_s"):
        evaluated = [_evaluate(trainer, model) for model in _models(trainer)]
    spend(costs, probes_s=sum(model.probes_s for model in evaluated))
    summary = _summary(trainer, evaluated)
    if ranks.is_first():
        publish(trainer.run_dir, trainer.config, summary, evaluated, trainer.networks.tokenizer)
        shutil.rmtree(trainer.run_dir / "evaluations", ignore_errors=True)
    return summary


# --- what every run shares -------------------------------------------------------------------------------------------


def summarize(
    config: RunConfig,
    stages: Sequence[Mapping[str, Any]],
    evaluated: Sequence[Evaluated],
    costs: Mapping[str, float],
    device: torch.device,
    environments: Environments,
    **more: Any,
) -> dict[str, Any]:
    """Make the summary that `summary.json` holds of every run.

    Args:
        config: The run's settings.
        stages: What was trained, first to last: `name`, `steps` and `checkpoint` of each.
        evaluated: The models measured, the trained one included.
        costs: Seconds, tokens, episodes and steps, by name.
        device: Where the networks were.
        environments: Environments of the training and of the test.
        **more: Entries that replace the defaults: no gain measured, no demonstrations, no estimator.
    """
    summary = {
        "algo": config.algo["name"],
        "stages": list(stages),
        "seed": config.seed,
        "evaluation": {model.name: model.by_mode() for model in evaluated},
        "arc": {model.name: model.arc for model in evaluated if model.arc},
        "evaluated_before": [model.name for model in evaluated if model.kept],
        "gain": {},
        "teacher_in_memory_during_policy_evaluation": any(
            model.teacher_in_memory for model in evaluated if model.name != "teacher"
        ),
        "demonstrations": {},
        "costs": {name: round(cost, 3) for name, cost in sorted(costs.items())},
        "speeds": {name: round(speed, 1) for name, speed in speeds(costs).items()},
        "teacher_share_of_training": _teacher_share(costs),
        "kl_estimator": None,
        "fingerprints": fingerprints(
            environments.envs("test"), evaluated[0].num_questions, environments.dataset("train")
        ),
        "config": asdict(config),
        "settings_without_effect": sorted(settings_without_effect()),
        **provenance(device),
    }
    return summary | more


def publish(
    run_dir: Path,
    config: RunConfig,
    summary: Mapping[str, Any],
    evaluated: Sequence[Evaluated],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Hand the final figures to the loggers, write `summary.json`, and print them with a whole episode.

    The summary makes a run complete, so it comes after the loggers: where one fails, the same command tries again.
    """
    _log(run_dir, config, summary, evaluated[0].group_names)
    write_summary(run_dir, summary)
    _show(console(), run_dir, evaluated, summary, tokenizer)


# --- what the evaluation of a single checkpoint shares ---------------------------------------------------------------


def provenance(device: torch.device) -> dict[str, Any]:
    """What the figures were made with: command, date, commit, versions, machine and the most memory that was used."""
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "peak_memory_mb": round(peak_memory() / 2**20),
        "versions": versions(),
        "machine": {"device": str(device), "processor": platform.machine(), "processes": ranks.count()},
    }


def _commit() -> str | None:
    """The commit of the code, with `+` behind it if files have been changed; None where no git checkout tracks it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:  # an installed package may lie in the environment of another project's checkout
        tracked = subprocess.run([*git, "ls-files", Path(__file__).name], capture_output=True, text=True, timeout=10)
        described = [*git, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(described, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (tracked.stdout and done.stdout.strip()) or None


def console() -> Console:
    """The terminal. It is 120 characters wide if the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)


def results_table(evaluated: Sequence[Evaluated]) -> Table:
    """Make a table with a row per model and mode: exact match per group of questions, other figures over all."""
    groups = next(iter(evaluated[0].figures.values()))
    table = Table(title=f"exact match on {groups['all']['n']} questions, with 95 % bootstrap intervals")
    table.add_column("model")
    table.add_column("decoding")
    for group in groups:
        table.add_column(Text(printable(group)), justify="center")
    for name in ("F1", "searches", "malformed"):
        table.add_column(name, justify="right")
    for model in evaluated:
        for mode, figures in model.by_mode().items():
            cells = []
            for of_group in figures.values():
                low, high = of_group["exact_match_interval"]
                cells.append(f"{of_group['exact_match']:.3f}\n{low:.2f}-{high:.2f}")
            whole = figures["all"]
            rest = f"{whole['f1']:.3f}", f"{whole['num_searches']:.2f}", f"{whole['malformed_fraction']:.1%}"
            table.add_row(model.name, mode, *cells, *rest)
        table.add_section()
    return table


def show_episode(
    terminal: Console, name: str, trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print one whole episode, if possible a correct one with searches."""
    shown = next((t for t in trajectories if t.correct and len(t.turns) > 2), trajectories[0])
    title = f"a test episode of {name}: {'right' if shown.correct else 'wrong'}"
    terminal.rule(Text(printable(title, terminal.encoding), "rule.text"))
    terminal.print(Text(printable(transcript(shown, tokenizer), terminal.encoding)))
    terminal.rule()


# --- a run -----------------------------------------------------------------------------------------------------------


class _Model(NamedTuple):
    """A model to be measured."""

    name: str
    path: str
    load: Callable[[], PreTrainedModel]


def _models(trainer: Trainer) -> list[_Model]:
    """List the raw policy, the policy after each stage that had any step, and the teacher."""
    networks = trainer.networks
    paths = [("raw", networks.place_of_policy)]
    trained = [stage for stage in _stages(trainer) if stage["steps"]]
    for stage in trained:
        checkpoint.require_whole(trainer.run_dir / stage["checkpoint"])
    paths += [(stage["name"], str(trainer.run_dir / stage["checkpoint"])) for stage in trained]
    models = [_Model(name, path, partial(networks.load, path)) for name, path in paths]
    if networks.place_of_teacher is not None:
        models.append(_Model("teacher", networks.place_of_teacher, networks.teacher))
    return models


def _evaluate(trainer: Trainer, model: _Model) -> Evaluated:
    """Measure a model; it is in memory only meanwhile."""
    networks, config, envs = trainer.networks, trainer.config, trainer.environments.envs("test")
    is_trained = model.name == _stages(trainer)[-1]["name"]
    root = trainer.run_dir if is_trained else Path(config.cache_dir).expanduser()
    is_teacher = model.name == "teacher"
    # A search service may answer one process and not another, and all must take the same way.
    kept_in = ranks.decided(lambda: place(root / "evaluations", config, networks, envs, model.path, is_teacher))
    waiting = "waiting for another run, which evaluates the same model"
    with exclusively(kept_in.with_suffix(".lock"), waiting) if kept_in and ranks.is_first() else nullcontext():
        result = evaluation.evaluate_model(
            model.name,
            model.load,
            networks,
            envs,
            config.evaluation,
            trainer.run_dir,
            probes=config.probes,
            kept_in=kept_in,
        )
    networks.release_teacher()
    if result.kept:
        print(f"{model.name}: measured before, kept in {kept_in}", flush=True)
    return result


def _stages(trainer: Trainer) -> list[dict[str, Any]]:
    """List what was trained, first to last. A stage without steps has no checkpoint; without checks, no best one."""
    position = trainer.position
    of_stages = zip(trainer.stages, pairwise(position.stage_starts), position.best_checks[:-1], strict=True)
    return [
        {
            "name": stage.name,
            "steps": end - start,
            "checkpoint": checkpoint_name(end) if end > start else None,
            "best_on_dev": None if best is None else {"checkpoint": checkpoint_name(best[0]), "exact_match": best[1]},
        }
        for stage, (start, end), best in of_stages
    ]


def _summary(trainer: Trainer, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    config = trainer.config
    demonstrations = {stage.name: found for stage, found in trainer.sources.demonstrations.items()}
    costs = dict(trainer.position.costs, demonstrations_s=trainer.sources.demonstrations_s)
    costs["teacher_sampled_tokens"] = trainer.sources.teacher_tokens
    trained_by = trainer.stages[-1].config
    return summarize(
        config,
        _stages(trainer),
        evaluated,
        costs,
        trainer.networks.device,
        trainer.environments,
        gain=_gains(evaluated, config.evaluation.seed),
        demonstrations={name: found.counts() for name, found in demonstrations.items()},
        kl_estimator=trained_by.kl_estimator if isinstance(trained_by, PolicyGradientConfig) else None,
        precision=trainer.networks.precision,
        precision_reason=trainer.networks.precision_reason,
        attention=trainer.networks.attention,
        cuda_graphs=trainer.networks.cuda_graphs,
    )


def _gains(evaluated: Sequence[Evaluated], seed: int) -> dict[str, Any]:
    """Exact match of the final policy minus that of the model it started from, by mode of decoding."""
    final = _final(evaluated)
    before = evaluated[[model.name for model in evaluated].index(final.name) - 1]
    gains = {}
    for temperature, trajectories in final.trajectories.items():
        difference, bounds = evaluation.gain(trajectories, before.trajectories[temperature], seed)
        gains[mode_name(temperature)] = {"over": before.name, "exact_match": difference, "interval": bounds}
    return gains


def _final(evaluated: Sequence[Evaluated]) -> Evaluated:
    """Find the policy after the last stage: the last model, or the one before the teacher."""
    return evaluated[-2] if evaluated[-1].name == "teacher" else evaluated[-1]


def _teacher_share(costs: Mapping[str, float]) -> float:
    """Share of the training's tokens, sampled and trained, that went through the teacher."""
    of_teacher = costs.get("teacher_sampled_tokens", 0.0) + costs.get("teacher_scored_tokens", 0.0)
    of_policy = costs.get("sampled_tokens", 0.0) + costs.get("trained_tokens", 0.0)
    return of_teacher / (of_teacher + of_policy) if of_teacher + of_policy else 0.0


def _log(run_dir: Path, config: RunConfig, summary: Mapping[str, Any], names: Sequence[str]) -> None:
    """Hand the final figures to the loggers; those of a single group of questions also under its name."""
    final = summary["stages"][-1]["name"]
    step = sum(stage["steps"] for stage in summary["stages"])
    with_groups = {
        f"eval/{group}/exact_match" + ("" if mode == "greedy" else f"/{mode}"): figures["exact_match"]
        for mode, groups in summary["evaluation"][final].items()
        for group, figures in {**dict.fromkeys(names, groups["all"]), **groups}.items()
    }
    of_probes = evaluation.arc_metrics(summary["arc"].get(final, {}))
    write_results(run_dir, config.logger, with_groups | of_probes, step)


def _show(
    terminal: Console,
    run_dir: Path,
    evaluated: Sequence[Evaluated],
    summary: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Print the tables of results and one whole episode of the trained policy."""
    terminal.print(results_table(evaluated))
    show_arc(terminal, evaluated)
    for name, counts in summary["demonstrations"].items():
        found = f"{counts['found']} demonstrations of {counts['wanted']} wanted"
        found = found if counts["found"] else "SKIPPED for want of demonstrations"
        terminal.print(f"{name}: {found}, from {counts['asked']} training questions")
        for part in ("dropped", "costs"):
            if numbers := counts.get(part):
                told = ", ".join(f"{number} {value:,.6g}" for number, value in numbers.items())
                terminal.print(f"{name}: {part}: {told}")
    for mode, gained in summary["gain"].items():
        low, high = gained["interval"]
        terminal.print(
            f"gain over {gained['over']}, {mode}: {gained['exact_match']:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f})"
        )
    best = summary["stages"][-1].get("best_on_dev")
    if best is not None and best["checkpoint"] != summary["stages"][-1]["checkpoint"]:
        terminal.print(f"best on the dev split ({best['exact_match']:.3f}), and earlier than what is measured above:")
        place = shlex.quote(str(run_dir / best["checkpoint"]))
        terminal.print(f"python -m algorithms.evaluate checkpoint={place}", soft_wrap=True)
    final = _final(evaluated)
    trajectories = next(iter(final.trajectories.values()))
    show_episode(terminal, f"the policy after {final.name}", trajectories, tokenizer)
    terminal.print(f"run directory: {run_dir}", soft_wrap=True)
    if (run_dir / "tb").exists():
        terminal.print(f"curves:        tensorboard --logdir {shlex.quote(str(run_dir / 'tb'))}", soft_wrap=True)
        terminal.print("               they stand in its tab Custom Scalars")
    elif (run_dir / METRICS_FILE).exists():
        terminal.print(f"curves:        {run_dir / METRICS_FILE}", soft_wrap=True)
