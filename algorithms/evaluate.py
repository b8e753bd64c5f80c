"""Score a checkpoint: `python -m algorithms.evaluate checkpoint=<run directory | Hugging Face folder | hub id>`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import algorithms.launch.resolvers  # noqa: F401  # names the jobs of a multirun
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.terminal import escape_what_streams_lack, printable
from algorithms.launch.clear_errors import clear_errors
from algorithms.launch.command_line import prepare
from algorithms.launch.processes import carry_out, start
from algorithms.learner.adapter_folders import ADAPTER_FILE
from algorithms.sb3.learner import is_outside_learner
from algorithms.training.agent_files import Agent, read_agent, tell_overruled
from algorithms.training.model_names import newest_checkpoint, resolve_model
from algorithms.training.run_files import CONFIG_FILE, read_overrides, read_settings, write_summary
from algorithms.training.schemas import register_schemas
from algorithms.training.settings import QUESTION_PARTS, RunConfig, settings_with_effect, settings_without_effect
from algorithms.training.typed import evaluate_config

with clear_errors():  # of a plug-in
    register_schemas()


@dataclass
class Found:
    """Where a checkpoint is, and the settings that it was trained with.

    Attributes:
        model: Folder in Hugging Face format, bundled name or hub id.
        settings: Settings of the run that it comes from, or those that its `agent.json` brings; empty without either.
        agent: What its `agent.json` says; None if it has none.
        run_dir: Directory of the run that it comes from; None if it lies in none.
    """

    model: str
    settings: dict[str, Any]
    agent: Agent | None = None
    run_dir: Path | None = None

    def tell_overruled(self, config: RunConfig) -> None:
        """Say which settings of the agent's protocol the command line has changed."""
        if self.agent is not None:
            tell_overruled(self.agent.protocol, asdict(config), self.model)


def main() -> None:
    """Entry point; Hydra composes the configuration. `torchrun` calls it in several processes."""
    escape_what_streams_lack()
    start(_read, evaluate)


def _read() -> None:
    with clear_errors():
        prepare("evaluate")
    _main()


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def _main(config: DictConfig) -> None:
    with clear_errors():
        given: Any = OmegaConf.to_container(config, resolve=True)
        found = find(given.pop("checkpoint"), given["cache_dir"], given)
        settings = evaluate_config(given, found.model, found.settings)
        found.tell_overruled(settings)
        carry_out(evaluate, settings, Path(HydraConfig.get().runtime.output_dir))


def find(name: str | None, cache_dir: str = RunConfig.cache_dir, given: Mapping[str, Any] | None = None) -> Found:
    """Find the model behind a name, the run that it comes from, and what its `agent.json` says.

    Args:
        name: A run directory, which stands for its newest complete checkpoint; a folder in Hugging Face format, such as
            `checkpoints/<step>` of a run; a `.gguf` file; a bundled name; or a hub id.
        cache_dir: Where folders of `.gguf` files are kept.
        given: The command line, shaped like `EvaluateConfig`; it has to say what `agent.json` may not. None: nothing is
            played, so nothing has to be said.

    Raises:
        ConfigurationError: The name is missing, or names a folder or file of another kind; or the command line lacks
            texts that `agent.json` may not bring.
    """
    if not name or name == "???":
        raise ConfigurationError("checkpoint=... is missing; give a run directory, a Hugging Face folder or a hub id.")
    path = Path(name).expanduser()
    if (path / CONFIG_FILE).is_file():
        settings = _settings(path)
        if is_outside_learner(algorithm := (settings.get("algo") or {}).get("name")):
            raise ConfigurationError(
                f"The run {name} trained {algorithm}, which is no language model and is measured by its "
                "own run; see summary.json there, or train again with other dataset=... or evaluation=... settings."
            )
        return _with_agent(Found(str(newest_checkpoint(path)), settings, run_dir=path), given)
    is_model = any((path / name).is_file() for name in ("config.json", ADAPTER_FILE))
    if path.exists() and path.suffix != ".gguf" and not is_model:
        listed = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else "a file"
        raise ConfigurationError(
            f"checkpoint={name} is neither a run directory ({CONFIG_FILE} is missing) nor a Hugging Face model or "
            f"adapter (config.json and {ADAPTER_FILE} are missing); found: {listed or 'nothing'}. Give the folder that "
            "a run printed, a folder written by save_pretrained, or a hub id."
        )
    if run_dir := _run_of(path):
        from algorithms.training.checkpoint import require_whole

        require_whole(path)
    found = Found(resolve_model(name, cache_dir), _settings(run_dir) if run_dir else {}, run_dir=run_dir)
    return _with_agent(found, given)


def _run_of(folder: Path) -> Path | None:
    """The run directory in which a checkpoint's folder lies; None if it lies in none."""
    run_dir = folder.absolute().parent.parent
    of_run = folder.exists() and folder.absolute().parent.name == "checkpoints" and (run_dir / CONFIG_FILE).is_file()
    return run_dir if of_run else None


def _with_agent(found: Found, given: Mapping[str, Any] | None) -> Found:
    """Add what `agent.json` says. In a run directory only the precision is news; all else stands in the settings."""
    found.agent = read_agent(found.model)
    if found.agent is None:
        return found
    if found.run_dir is not None:
        found.settings["learner"] = {**found.settings.get("learner", {}), "precision": found.agent.precision}
        return found

    def is_said(key: str) -> bool:
        part, _, setting = key.partition(".")
        return given is None or part not in given or bool({"name", setting} & given[part].keys())

    found.agent.require_said(is_said, found.model)
    found.settings = found.agent.settings
    return found


def _settings(run_dir: Path) -> dict[str, Any]:
    """Read the settings saved in a run directory, and leave out what does not have the form of settings."""
    settings = read_settings(run_dir)
    for group in ("algo", "env", "dataset", "retriever", "reward", "rollout", "learner", "evaluation"):
        section = settings.get(group, {})
        if section is None and group in QUESTION_PARTS:  # the environment brings its own questions
            continue
        unnamed = group in ("rollout", "learner", "evaluation") or section == {}
        if not isinstance(section, dict) or not (unnamed or isinstance(section.get("name"), str)):
            raise DataError(f"{run_dir / CONFIG_FILE}: {group} is no section of settings.")
    if type(settings.get("num_envs", 1)) is not int:
        raise DataError(f"{run_dir / CONFIG_FILE}: num_envs is no number.")
    return settings


def _trained(model: Path) -> dict[str, Any]:
    """What a summary says of a checkpoint's training, for `compare`; nothing if the model comes from no run."""
    if (run_dir := _run_of(model)) is None:
        return {}
    from algorithms.training.checkpoint import is_newest

    trained = {
        "config": settings_with_effect(read_settings(run_dir)),
        "overrides": read_overrides(run_dir),
        "is_last": is_newest(model),
    }
    return {"trained": trained}


def evaluate(config: RunConfig, output_dir: Path) -> dict[str, Any]:
    """Let a model play a split in every mode of decoding. No teacher is loaded; processes of `torchrun` share the work.

    Args:
        config: The settings; `model.policy` is the model, `dataset.split` what it plays.
        output_dir: Where `summary.json`, `trajectories/` and `predictions/` go.

    Returns:
        The summary, as `summary.json` holds it.
    """
    # Imported here, so that --help and the report of a typo need not wait for torch.
    from algorithms.learner import ranks
    from algorithms.training import evaluation
    from algorithms.training.arc_table import show_arc
    from algorithms.training.build import Environments, Networks
    from algorithms.training.fingerprints import fingerprints
    from algorithms.training.summary import console, provenance, results_table, show_episode
    from algorithms.training.threads import threads

    ranks.join()
    started = time.perf_counter()
    split = config.dataset["split"]
    with threads(config.threads):
        networks = Networks(config)
        envs = Environments(config, networks.tokenizer).envs(split)
        result = evaluation.evaluate_model(
            "checkpoint", lambda: networks.policy, networks, envs, config.evaluation, output_dir, split, config.probes
        )
    summary = {
        "checkpoint": config.model.policy,
        **_trained(Path(config.model.policy)),
        "split": split,
        "evaluation": {result.name: result.by_mode()},
        "arc": {result.name: result.arc},
        "teacher_in_memory_during_policy_evaluation": result.teacher_in_memory,
        "costs": {
            "evaluation_s": round(time.perf_counter() - started, 3),
            "probes_s": round(result.probes_s, 3),
        },
        "fingerprints": fingerprints(envs, result.num_questions),
        "precision": networks.precision,
        "precision_reason": networks.precision_reason,
        "attention": networks.attention,
        "cuda_graphs": networks.cuda_graphs,
        "config": asdict(config),
        "settings_without_effect": sorted(settings_without_effect()),
        **provenance(networks.device),
    }
    if not ranks.is_first():
        return summary
    write_summary(output_dir, summary)
    terminal = console()
    played = f"{result.num_questions} of the {len(envs.dataset)} questions of {envs.dataset.name}, split {split}"
    terminal.print(printable(played, terminal.encoding), markup=False, highlight=False)
    terminal.print(results_table([result]))
    show_arc(terminal, [result])
    show_episode(terminal, config.model.policy, next(iter(result.trajectories.values())), networks.tokenizer)
    terminal.print(f"written to {output_dir}", soft_wrap=True)
    return summary


if __name__ == "__main__":
    main()
