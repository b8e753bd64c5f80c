"""The README.md of an exported agent: where it comes from, how it is asked, and what it reached."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentic_rag_env.prompts import PROMPTS
from agentic_rag_env.terminal import printable
from algorithms.training.agent_files import AGENT_FILE, Agent

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(name: str, agent: Agent | None, settings: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    """Write the card.

    Args:
        name: Name of the exported folder.
        agent: What `agent.json` says, if there is one.
        settings: Settings of the run, or of them only `model.policy`: the base model of an adapter that comes from no
            run. Empty if nothing is known.
        summary: `summary.json` of the run, with the entry `figures`: those of this checkpoint by mode and group; None
            if it was not measured.
    """
    policy, algorithm = _at(settings, "model", "policy"), _at(settings, "algo", "name")
    is_on_hub = isinstance(policy, str) and _HUB_ID.fullmatch(policy) and not Path(policy).exists()
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [search-agent]"]
    front += [f"base_model: {json.dumps(policy)}"] if is_on_hub else []
    lines = [*front, "---", "", f"# {_line(name)}", "", "A language model that searches before it answers.", ""]
    base = _code(policy if is_on_hub else Path(policy).name) if isinstance(policy, str) else None
    if base and not isinstance(algorithm, str):
        lines += [f"An adapter, merged into {base}, whose licence applies to these weights.", ""]
    elif base:
        lines += [f"Trained with {_code(algorithm)} from {base}, whose licence applies to these weights."]
        dataset, retriever = (_code(_at(settings, part, "name")) for part in ("dataset", "retriever"))
        lines += [f"Data: {dataset}. Passages from: {retriever}.", ""]
    lines += ["```bash", f"python -m algorithms.ask checkpoint={shlex.quote(name)}"]
    lines += [f"python -m algorithms.evaluate checkpoint={shlex.quote(name)}", "```", ""]
    lines += _protocol(agent) if agent else []
    lines += _figures(summary) if summary else ["## Figures", "", "This checkpoint was not measured by its run.", ""]
    return "\n".join(lines)


def _protocol(agent: Agent) -> Iterator[str]:
    env = agent.env
    yield from ("## How it is asked", "", f"`{AGENT_FILE}` says it for programs.", "")
    prompt = env.get("prompt")
    if isinstance(prompt, str):
        template = PROMPTS.get(prompt, prompt)
        yield from ("The question stands in this message, which goes through the chat template if there is one:", "")
        yield from (f"    {_line(line)}" for line in template.splitlines())
        yield ""
    yield f"An action ends with {' or '.join(map(_code, agent.action_ends))}."
    yield f"It may have {agent.rollout['max_new_tokens']} tokens, and an episode {agent.rollout['max_tokens']}."
    turns = ", ".join(f"{_code(key)} {_code(value)}" for key, value in env.items() if key != "prompt")
    yield from (f"Environment: {turns}. Computed in {agent.precision}.", "")


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    split = _at(summary, "split") or "test"
    yield from (
        "## Figures",
        "",
        f"On the {_line(str(split))} split, with 95 % bootstrap intervals over questions.",
        "",
    )
    yield from ("| decoding | questions | n | exact match | F1 |", "| --- | --- | --- | --- | --- |")
    for mode, groups in summary["figures"].items():
        for group, figures in groups.items():
            scores = (_with_interval(figures, score) for score in ("exact_match", "f1"))
            yield f"| {_code(mode)} | {_code(group)} | {int(figures['n'])} | {' | '.join(scores)} |"
    yield ""
    command = shlex.split(str(_at(summary, "command") or ""))[1:]
    if command:
        yield from ("```bash", _line(f"python -m algorithms.run {shlex.join(command)}"), "```", "")
    facts = {"commit": _at(summary, "commit"), "date": _at(summary, "date"), "machine": _at(summary, "machine")}
    known = [f"{key} {_code(value)}" for key, value in facts.items() if value]
    yield from ([f"Measured with {', '.join(known)}.", ""] if known else [])


def _with_interval(figures: Mapping[str, Any], score: str) -> str:
    value = float(figures[score])
    if (interval := figures.get(f"{score}_interval")) is None:
        return f"{value:.3f}"
    low, high = map(float, interval)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _code(value: Any) -> str:
    """A text as code in Markdown, where nothing in it is a tag or a link."""
    return f"`{_line(str(value)).replace('`', chr(39)).replace('|', '/')}`"


def _line(text: str) -> str:
    return printable(text).replace("\n", "\\n")
