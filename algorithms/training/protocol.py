"""The protocol of a new run: that of the agents it starts from, unless the command line says otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import ENVS
from agentic_rag_env.terminal import print_line
from algorithms.training.agent_files import AGENT_FILE, LIMITS, Agent, listed, read_agent, tell_overruled
from algorithms.training.model_names import resolve_model
from algorithms.training.run_files import differences
from algorithms.training.schemas import named_settings
from algorithms.training.setting_errors import told


def with_protocol(config: DictConfig, overrides: Sequence[str], quiet: bool = False) -> DictConfig:
    """Take over the protocol that the policy of a new run was trained in; without one, that of its teacher.

    The command line counts before it, and defaults, presets and experiments count behind it. A line says what was taken
    over, and another one what the command line has changed.

    Args:
        config: A composed configuration.
        overrides: What the user said: the command line, or the names of the settings that a program gave.
        quiet: Print no line.

    Raises:
        ConfigurationError: Policy and teacher were trained in different protocols, and the command line does not say
            which setting counts.
    """
    if config.resume is not None:
        return config  # its own settings, from which it was begun
    agents = _agents(config)
    if not agents:
        return config
    said = names_of(overrides)

    def is_said(key: str) -> bool:
        return any(key == each or key.startswith(f"{each}.") for each in said)

    _require_agreement(agents, is_said)
    (role, agent), *_ = agents.items()
    who = f"model.{role}={config.model[role]}"
    agent.require_said(lambda key: not key.startswith("env.") or is_said(key), who)
    adopted = _adopted(config, agent, is_said)
    if quiet:
        return adopted
    before, after = (_protocol_of(each) for each in (config, adopted))
    if found := differences(before, after):
        told, instead = listed(found, 2), listed(found, 1)
        print_line(f"{who} was trained with {told}, which counts here too (not {instead}).")
    for role, agent in agents.items():
        tell_overruled(agent.protocol, after, f"model.{role}={config.model[role]}")
    return adopted


def names_of(overrides: Sequence[str]) -> list[str]:
    """Dotted names of the settings that overrides set."""
    return [override.lstrip("+~").partition("=")[0].rpartition("@")[2] for override in overrides]


def _agents(config: DictConfig) -> dict[str, Agent]:
    """Read what policy and teacher bring, by role."""
    found = {}
    for role in ("policy", "teacher"):
        name = config.model[role]
        if name is not None and (agent := read_agent(resolve_model(name, config.cache_dir))) is not None:
            found[role] = agent
    return found


def _require_agreement(agents: Mapping[str, Agent], is_said: Callable[[str], bool]) -> None:
    """Refuse two protocols in one run, because both models read the same episodes."""
    if len(agents) < 2:
        return
    policy, teacher = agents["policy"].protocol, agents["teacher"].protocol
    found = [each for each in differences(policy, teacher) if not is_said(each[0])]
    if found:
        raise ConfigurationError(
            f"The policy was trained with {listed(found, 1)}, and the teacher with {listed(found, 2)}. Both read the "
            f"same episodes, so say which counts; for the policy's: {' '.join(f'{key}={was}' for key, was, _ in found)}"
        )


def _adopted(config: DictConfig, agent: Agent, is_said: Callable[[str], bool]) -> DictConfig:
    """A copy of a configuration with the protocol of an agent, where the command line says nothing else."""
    adopted = copy.deepcopy(config)
    current: Any = OmegaConf.to_container(config.env, resolve=True)
    kept = {name: value for name, value in current.items() if is_said(f"env.{name}")}
    limits = {name: value for name, value in agent.protocol["rollout"].items() if not is_said(f"rollout.{name}")}
    with open_dict(adopted):
        try:
            adopted.rollout = OmegaConf.merge(adopted.rollout, limits)
            if not is_said("env"):
                same = current["name"] == agent.env["name"]
                schema = named_settings(ENVS, agent.env["name"])
                adopted.env = OmegaConf.merge(schema, current if same else {}, agent.env, kept)
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{AGENT_FILE}: {told(error)}") from error
    return adopted


def _protocol_of(config: DictConfig) -> dict[str, Any]:
    env, rollout = (OmegaConf.to_container(config[name], resolve=True) for name in ("env", "rollout"))
    return {"env": env, "rollout": {name: rollout[name] for name in LIMITS}}  # type: ignore[index,call-overload]
