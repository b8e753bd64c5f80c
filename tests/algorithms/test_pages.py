"""The commands on the project's pages and in its presets: each composes, and what trains a large model fits a GPU."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_experiments import run_settings

from algorithms.training.preflight import plan

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "algorithms/README.md", "agentic_rag_env/README.md"]
#: What stands for something of the reader's own, is chosen by a plug-in or an extra, or says no settings.
LEFT_OUT = re.compile(r"\.\.\.|<|actor_critic|rloo|SkyRL|submitit|calculator|resume=|--help")


def commands() -> list[str]:
    """What follows `algorithms.run` in code on the pages, and in comments of the configuration."""
    lines = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block, inline in re.findall(r"```bash\n(.*?)```|(?<!`)`([^`]+)`(?!`)", text, flags=re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines() if block else [inline.replace("\n", " ")]
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        lines += [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = [line.partition("-m algorithms.run ")[2].split(" #")[0].strip() for line in lines]
    return sorted({command for command in found if "=" in command and not LEFT_OUT.search(command)})


def settings_of(command: str) -> list[str]:
    """The settings of a command's first run, but for those that say how it is started."""
    words = [word for word in shlex.split(command) if "=" in word and not word.startswith("hydra.")]
    if "-m" in shlex.split(command):
        words = [re.sub(r"^([^=]+=[^,\[{]*),.*", r"\1", word) for word in words]
    return [word for word in words if word != "preflight=true"]


@pytest.mark.parametrize("command", commands())
def test_a_command_composes(command):
    assert run_settings(*settings_of(command)) is not None


LARGE = [command for command in commands() if re.search("qwen|llama|h200|paper", command.lower())]


@pytest.mark.parametrize("command", LARGE)
def test_a_command_for_a_large_model_fits_an_h200(command):
    settings = settings_of(command)
    found = plan(run_settings(*settings, *([] if "+scale=h200x8" in settings else ["hardware.gpu=h200"])))
    assert found["fits"], (found["peak"], found.get("change"))


def test_commands_are_found():
    assert len(commands()) > 25
    assert len(LARGE) > 10
