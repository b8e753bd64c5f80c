"""Ask a trained agent: `python -m algorithms.ask checkpoint=<run directory | folder | hub id> [question="..."]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from agentic_rag_env.terminal import escape_what_streams_lack, printable, rich_console
from algorithms.evaluate import find
from algorithms.launch.clear_errors import clear_errors
from algorithms.launch.command_line import prepare
from algorithms.launch.processes import wait_passively
from algorithms.training.schemas import register_schemas
from algorithms.training.settings import RunConfig
from algorithms.training.typed import ask_config

if TYPE_CHECKING:
    from agentic_rag_env.types import StepInfo

with clear_errors():  # of a plug-in
    register_schemas()


def main() -> None:
    """Entry point; Hydra composes the configuration."""
    escape_what_streams_lack()
    wait_passively()
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    with clear_errors():
        prepare("ask")
    _main()


@hydra.main(version_base="1.3", config_path="../conf", config_name="ask")
def _main(config: DictConfig) -> None:
    with clear_errors():
        given: Any = OmegaConf.to_container(config, resolve=True)
        question = given.pop("question")
        found = find(given.pop("checkpoint"), given["cache_dir"], given)
        settings = ask_config(given, found.model, found.settings)
        found.tell_overruled(settings)
        ask(settings, _typed() if question is None else [question], _print)


def ask(config: RunConfig, questions: Iterator[str] | Sequence[str], show: Callable[[str, str], None]) -> None:
    """Let a model answer questions, each as an episode of its own.

    Args:
        config: The settings; `model.policy` is the model, `dataset` brings the passages.
        questions: Questions in plain words, taken one by one.
        show: Called with each text as soon as it exists, and with its kind: "note", "action", "observation" or
            "answer".
    """
    from algorithms.training.threads import threads  # which loads torch

    with threads(config.threads):
        _ask(config, questions, show)


def _ask(config: RunConfig, questions: Iterator[str] | Sequence[str], show: Callable[[str, str], None]) -> None:
    # Imported here, so that --help and the report of a typo need not wait for torch.
    from gymnasium.vector import AutoresetMode

    from agentic_rag_env.datasets.base import QuestionSet
    from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS
    from agentic_rag_env.types import Question
    from algorithms.rollout.tokenization import PlainEncoder
    from algorithms.training.build import Networks

    networks = Networks(config)
    corpus = DATASETS.build(config.dataset).corpus
    retriever = RETRIEVERS.build(config.retriever, corpus=corpus)
    show(f"{config.model.policy} on {networks.device}, {networks.precision}, greedy\n", "note")
    for text in questions:
        # Nobody knows the right answer, so the scores against the empty one are not shown.
        asked = QuestionSet("asked", [Question("asked", text, ("",))], corpus)
        envs = ENVS.build(
            config.env,
            num_envs=1,
            autoreset_mode=AutoresetMode.DISABLED,
            dataset=asked,
            retriever=retriever,
            reward=config.reward,
            tokenizer=PlainEncoder(networks.tokenizer),
        )
        # Any: it stands in for the environments, and the player uses only what `TextEnvs` declares.
        watched: Any = _Watched(envs, show)
        played, _ = networks.player(networks.policy, watched).rollout([0], seed=(config.seed,))
        show(_verdict(played[0].turns[-1].info), "answer")


class _Watched:
    """An environment whose turns are shown as they happen."""

    def __init__(self, envs: Any, show: Callable[[str, str], None]) -> None:
        self._envs, self._show = envs, show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def step(self, actions: Sequence[str | None]) -> Any:
        """See `TextEnvs`."""
        for action in actions:
            self._show(f"{action}\n", "action")
        result = self._envs.step(actions)
        self._show("".join(result[0]).strip("\n") + "\n", "observation")
        return result


def _verdict(info: StepInfo | Mapping[str, Any]) -> str:
    if info["answer"] is not None:
        return f"Answer: {info['answer']}\n"
    reason = info["error"] or f"{info['ending']}, after {info['num_searches']} searches"
    return f"No answer ({reason}).\n"


def _typed() -> Iterator[str]:
    """Questions that a person types, until an empty line or the end of the input."""
    while True:
        try:
            line = input("\nquestion (empty to leave): ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


def _print(text: str, kind: str) -> None:
    console = rich_console("Asking")
    style = {"note": "dim", "action": "cyan", "observation": "dim", "answer": "bold"}[kind]
    console.print(printable(text, console.encoding), style=style, end="")


def _quoted(argument: str) -> str:
    """Quote a question so that Hydra reads all of it as text and none of it as grammar."""
    key, sign, text = argument.partition("=")
    if key != "question" or not sign:
        return argument
    # Backslashes are doubled where they would escape an interpolation, a quote, or the closing quote.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"question='{escaped}'"


if __name__ == "__main__":
    main()
