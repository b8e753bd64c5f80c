"""Model presets: `conf/model/<name>.yaml` also says what other settings suit the model, and a run takes them.

The `settings` of a preset override the defaults; stages, experiments and the command line override the preset. Most
keys are those of a run (`rollout`, `learner`, `evaluation`, ...). Four of them depend on what else was chosen:

| key | goes to |
| --- | --- |
| `env` | the environment, if it has all these settings |
| `imitation` | every algorithm that trains on demonstrations, as far as it has the setting |
| `policy_gradient` | every other algorithm, as far as it has the setting |
| `critic` | `critic_optimizer` of those algorithms that have a critic |

What goes to an algorithm goes there wherever it stands in a chain of warm starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from agentic_rag_env.registry import ENVS
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.config import AlgorithmConfig, CriticConfig, DemonstrationConfig

#: The presets that come with the project.
FOLDER = Path(__file__).parents[2] / "conf" / "model"
#: Most parameters of a toy model.
TOY_PARAMETERS = 10_000_000
#: Learning rates from here on are for toys.
_TOY_LEARNING_RATE = 1e-3
_TOY_NEW_TOKENS = 48
_BY_CHOICE = ("env", "imitation", "policy_gradient", "critic")


def of_runs() -> dict[str, dict[str, Any]]:
    """Collect what presets say of everything but algorithms, for each choice of `<model>-<environment>`."""
    found = {}
    for model, settings in _presets().items():
        common = {key: value for key, value in settings.items() if key not in _BY_CHOICE}
        of_env = settings.get("env", {})
        for env in ENVS.names():
            fits = of_env.keys() <= ENVS.get(env).settings.keys()
            found[f"{model}-{env}"] = {**common, "env": dict(of_env)} if fits else common
    return found


def of_algorithms() -> dict[str, dict[str, Any]]:
    """Collect what presets say of algorithms, for each choice of `<model>-<algorithm>`."""
    return {
        f"{model}-{algorithm}": _of_algorithm(settings, algorithm)
        for model, settings in _presets().items()
        for algorithm in ALGORITHMS.names()
    }


@cache
def _presets() -> dict[str, dict[str, Any]]:
    found = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}
    return {name: content["settings"] for name, content in found.items() if content.get("settings")}


def _of_algorithm(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    algorithm = ALGORITHMS.get(name)
    config = algorithm.config
    if config is None or not issubclass(config, AlgorithmConfig):
        return {}
    key = "imitation" if issubclass(config, DemonstrationConfig) else "policy_gradient"
    chosen = {name: value for name, value in settings.get(key, {}).items() if name in algorithm.settings}
    if issubclass(config, CriticConfig) and "critic" in settings:
        chosen["critic_optimizer"] = settings["critic"]
    return chosen


def toy_settings(config: Any, stages: Sequence[Any], num_parameters: int) -> str | None:
    """Return a warning if a real model meets settings that were made for the bundled toy; else None.

    Args:
        config: The run's settings, a `RunConfig`.
        stages: The run's algorithms, with names and settings.
        num_parameters: Parameters of the policy.
    """
    if num_parameters <= TOY_PARAMETERS:
        return None
    met = [
        f"learning rate {optimizer.learning_rate:g} of {owner}{stage.name}"
        for stage in stages
        for owner, name in (("", "optimizer"), ("the critic of ", "critic_optimizer"))
        if (optimizer := getattr(stage.config, name, None)) and optimizer.learning_rate >= _TOY_LEARNING_RATE
    ]
    if config.env.get("prompt") == "bare":
        met.append("env.prompt=bare, which tells the model nothing of the protocol")
    if config.rollout.max_new_tokens <= _TOY_NEW_TOKENS:
        met.append(f"rollout.max_new_tokens={config.rollout.max_new_tokens}")
    if not met:
        return None
    presets = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "tiny"))
    return (
        f"The policy has {num_parameters / 1e6:.0f}M parameters and meets settings that were made for a network of "
        f"0.2M: {'; '.join(met)}. Take the model's preset ({presets}), with model.policy=... for weights elsewhere: "
        "model=smollm2_135m model.policy=<folder>."
    )
