"""Plans a run before it starts: memory, disk, tokens and time of every stage.

On this machine and in one process, a few real steps of every stage are carried out, and the times are theirs. The time
on another machine or on several processes, or with models that are not here, is arithmetic, as memory always is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from agentic_rag_env.files import write_whole
from agentic_rag_env.weight_files import WEIGHT_INDEX
from algorithms.learner.adapter_folders import ADAPTER_WEIGHTS
from algorithms.learner.algorithm import trains_language_model
from algorithms.learner.model_folders import as_folder, is_cached
from algorithms.training.build import build_stages
from algorithms.training.evaluation import questions_at_end
from algorithms.training.hardware import GIB, device_of
from algorithms.training.model_names import resolve_model
from algorithms.training.model_shapes import shape_of
from algorithms.training.run_directory import PLAN_FILE
from algorithms.training.settings import RunConfig
from algorithms.training.stage_plan import StagePlan
from algorithms.training.trial import STEPS, Trial, try_out

#: Share of a device's memory that a plan may fill.
_FILL = 0.92


def plan(config: RunConfig, trial: Trial | None = None) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: The run's settings; `hardware` says for which machine.
        trial: What a few steps took here; None: all times are computed.

    Returns:
        Plain data: `fits`, the memory of each phase of each stage for one device [GiB], what of it is too much and the
        smallest change that would do, disk, tokens and time.

    Raises:
        ConfigurationError: The shape of a model cannot be read, or the algorithm trains no language model.
    """
    policy = shape_of(resolve_model(config.model.policy, config.cache_dir))
    teacher = shape_of(resolve_model(config.model.teacher, config.cache_dir)) if config.model.teacher else None
    device, stages = device_of(config.hardware), build_stages(config.algo)

    def planned(settings: RunConfig) -> list[StagePlan]:
        return [StagePlan(stage, settings, policy, teacher, device) for stage in stages]

    made = planned(config)
    memory = _memory(made)
    needs, (where, phase) = _peak(memory)
    allowed = device.memory * _FILL
    times = {
        one.stage.name: one.time() if trial is None else one.time_as_tried(trial, number)
        for number, one in enumerate(made)
    }
    found: dict[str, Any] = {
        "times are": "computed" if trial is None else f"of {STEPS} steps of each stage, measured here",
        "hardware": {"device": device.name, "count": config.hardware.count, "GiB each": round(device.memory / GIB, 1)},
        "models": {
            "policy": policy.parameters,
            "teacher": teacher.parameters if teacher else None,
            "trained": made[0].trained,
        },
        "assumed": {"tokens of an episode": made[0].tokens, "written by the model": made[0].written},
        "fits": needs <= allowed,
        "peak": {"GiB": round(needs / GIB, 2), "stage": where, "phase": phase, "allowed GiB": round(allowed / GIB, 2)},
        "memory of each device, GiB": _in_gib(memory),
        "time": times,
        "disk": _disk(config, made, [time["steps"] for time in times.values()]),
    }
    found["hours"] = round(sum(stage["hours"] for stage in found["time"].values()), 3)
    found["trained tokens"] = sum(
        stage["steps"] * stage.get("tokens of a step", one.stage.config.batch_size * one.tokens)
        for stage, one in zip(found["time"].values(), made, strict=True)
    )
    if trial is not None:
        questions = questions_at_end(config, len(made), trial.num_test)
        found["evaluation hours, at most"] = round(questions * trial.question_s / 3600, 3)
        found["peak of the trial, GiB"] = round(trial.peak / GIB, 2)
    if not found["fits"]:
        found["reason"] = _reason(memory, found)
        found["change"] = _change(config, planned, allowed)
    return found


def preflight(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Write the plan of a run to `preflight.json` and print its main lines.

    Raises:
        ConfigurationError: The run does not fit; the message says why and what would do.
    """
    if not trains_language_model(config.algo["name"]):
        raise ConfigurationError(
            f"Only runs that train a language model can be planned; {config.algo['name']} trains none."
        )
    found = plan(config)
    if found["fits"]:
        try:
            found = _tried(config, run_dir) or found
        except (AgenticRAGError, torch.OutOfMemoryError) as error:
            print(f"No step could be measured: {error}")
    write_whole(run_dir / PLAN_FILE, json.dumps(found, indent=2).encode())
    hardware, peak = found["hardware"], found["peak"]
    print(
        f"Plan for {hardware['count']} x {hardware['device']} ({hardware['GiB each']} GiB each): {peak['GiB']} GiB at "
        f"the peak ({peak['stage']}, {peak['phase']}; computed), about {_in_words(found['hours'])} of training"
        f"{_evaluation_in_words(found)} (times are {found['times are']}), {found['disk']['GiB']} GiB of checkpoints. "
        f"{run_dir / PLAN_FILE}"
    )
    if not found["fits"]:
        raise ConfigurationError(f"{found['reason']} {found['change']}")
    return found


def _tried(config: RunConfig, run_dir: Path) -> dict[str, Any] | None:
    """The plan with measured times; None where a run with these settings would not run in this process."""
    if config.hardware.gpu is not None or config.hardware.count > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return None
    policy, teacher = resolve_model(config.model.policy, config.cache_dir), config.model.teacher
    teacher = teacher and resolve_model(teacher, config.cache_dir)
    if absent := [name for name in (policy, teacher) if name and not _is_here(name)]:
        print(f"No step is measured, since {' and '.join(absent)} would have to be downloaded first.")
        return None
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, policy=policy, teacher=teacher))
    return plan(config, try_out(config, run_dir / "trial"))


def _is_here(model: str) -> bool:
    """Whether the weights of a model can be read without the network."""
    weights = ("model.safetensors", WEIGHT_INDEX, ADAPTER_WEIGHTS)
    return as_folder(model) is not None or is_cached(model, *weights)


def _in_words(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def _evaluation_in_words(found: dict[str, Any]) -> str:
    hours = found.get("evaluation hours, at most")
    return "" if hours is None else f" and {_in_words(hours)} of evaluation"


def _memory(made: list[StagePlan]) -> dict[str, dict[str, dict[str, int]]]:
    return {one.stage.name: one.memory() for one in made}


def _peak(memory: dict[str, dict[str, dict[str, int]]]) -> tuple[int, tuple[str, str]]:
    return max(
        (sum(parts.values()), (stage, phase)) for stage, phases in memory.items() for phase, parts in phases.items()
    )


def _in_gib(memory: Any) -> Any:
    if isinstance(memory, dict):
        return {name: _in_gib(value) for name, value in memory.items()}
    return round(memory / GIB, 3)


def _disk(config: RunConfig, made: list[StagePlan], steps: list[int]) -> dict[str, Any]:
    """The checkpoints: weights and optimizer of policy and critic; of every stage the last and the best one stay."""
    each = max(12 * (one.trained + one.critic) for one in made)
    written = sum(math.ceil(number / config.checkpoint_every) for number in steps)
    count = (written if config.keep_checkpoints is None else config.keep_checkpoints + len(made)) + len(made)
    free = shutil.disk_usage(Path.cwd()).free
    return {"GiB": round(each * count / GIB, 2), "checkpoints": count, "free GiB here": round(free / GIB, 1)}


def _reason(memory: dict[str, dict[str, dict[str, int]]], found: dict[str, Any]) -> str:
    peak = found["peak"]
    parts = sorted(memory[peak["stage"]][peak["phase"]].items(), key=lambda part: -part[1])[:3]
    what = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return (
        f"This run does not fit: stage {peak['stage']} needs {peak['GiB']} GiB on each device ({peak['phase']}: {what})"
        f", and {peak['allowed GiB']} of {found['hardware']['GiB each']} GiB can be filled."
    )


def _changes(config: RunConfig, chunk: int) -> Iterator[dict[str, Any]]:
    """Changes to try, where a chunk has so many tokens: first each alone, then each together with those before it."""
    learner, limit, rows = config.learner, config.rollout.max_tokens, config.num_envs
    found: list[tuple[str, Any]] = []
    if not learner.gradient_checkpointing:
        found.append(("learner.gradient_checkpointing", True))
    if learner.micro_batch_tokens > limit:
        found.append(("learner.micro_batch_tokens", limit))
    if chunk > 256:
        found.append(("learner.chunk_tokens", 256))
    while (rows := rows // 2) >= 8:
        found.append(("num_envs", rows))
    if learner.sharding == "none" and config.hardware.count > 1 and config.model.lora.rank is None:
        found.append(("learner.sharding", "fsdp2"))
    elif learner.sharding == "none" and learner.critic == "separate":
        found.append(("learner.critic", "shared"))
    yield from ({name: value} for name, value in found)
    yield from (dict(found[:count]) for count in range(2, len(found) + 1))


def _changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    of_learner = {name.removeprefix("learner."): value for name, value in settings.items() if name != "num_envs"}
    learner = dataclasses.replace(config.learner, **of_learner)
    return dataclasses.replace(config, learner=learner, num_envs=settings.get("num_envs", config.num_envs))


def _change(config: RunConfig, planned: Callable[[RunConfig], list[StagePlan]], allowed: float) -> str:
    """The smallest change with which the run fits, in words."""
    words, (needs, _) = "", _peak(_memory(planned(config)))
    for settings in _changes(config, planned(config)[0].chunk):
        words = " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
        needs, _ = _peak(_memory(planned(_changed(config, settings))))
        if needs <= allowed:
            return f"It would fit, with {needs / GIB:.1f} GiB, with {words}."
    however = f"With {words} it would still need" if words else "No setting is left to lower; it needs"
    return (
        f"{however} {needs / GIB:.1f} GiB: weights, gradients and optimizer take most of it. "
        "Train adapters (model.lora.rank=16), or take a smaller policy or a device with more memory."
    )
