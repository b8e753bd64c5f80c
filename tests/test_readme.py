"""The README's examples run as they stand there."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agentic_rag_env import registry
from algorithms import training
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.types import Batch, Tokens

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT, PYTHON, ALGORITHM = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(COMMAND,) = re.findall(r"^AGENTIC_RAG_PLUGINS=.*$", README, flags=re.MULTILINE)
#: Enough to make the command of the README a matter of seconds.
SMALL = [
    "threads=1", "num_envs=16", "dataset.num_passages=150", "dataset.num_questions=60", "probes=[]",
    "rollout.max_new_tokens=24", "rollout.max_tokens=512", "env.max_turns=2",
    "evaluation.num_questions=8", "evaluation.every=0", "evaluation.temperatures=[0.0]",
    "algo.steps=2", "algo.batch_size=16", "algo.warm_start.num_demonstrations=8", "algo.warm_start.epochs=1",
]  # fmt: skip


def test_environment_loop(capsys):
    exec(ENVIRONMENT, {})
    printed = capsys.readouterr().out
    assert "<information>Doc 1(Title: Lotaven)" in printed
    assert printed.rstrip().endswith("0.0 True 0.0 1")


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    """The example as it stands, with its call of `configure` made small."""
    monkeypatch.chdir(tmp_path)
    small = {
        "threads": 1, "num_envs": 8, "cache_dir": str(tmp_path / "cache"), "probes": [], "env": {"max_turns": 2},
        "dataset": {"num_passages": 100, "num_questions": 40}, "rollout": {"max_new_tokens": 16, "max_tokens": 400},
        "evaluation": {"num_questions": 4, "every": 2, "num_dev_questions": 4, "temperatures": [0.0]},
    }  # fmt: skip
    given = []

    def configure(**values):
        given.append(values)
        few = {"num_demonstrations": 16, "batch_size": 8}
        return training.configure(**{**values, **small, "algo": {**values["algo"], **few}})

    lines = PYTHON.replace("import configure, train", "import train")
    exec(lines, {"configure": configure})
    assert given == [{"algo": {"name": "sft", "epochs": 2}, "seed": 1}]
    printed = capsys.readouterr().out.splitlines()[-1]
    result = training.read_run("runs/sft")
    assert printed == f"{result.exact_match()} {result.curve('dev/exact_match')} {result.checkpoints[4]}"


@pytest.fixture
def rloo(tmp_path, monkeypatch):
    (tmp_path / "rloo.py").write_text(ALGORITHM, encoding="utf-8")
    monkeypatch.setenv(registry.PLUGINS_VARIABLE, str(tmp_path / "rloo.py"))
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))
    monkeypatch.setattr(ALGORITHMS, "_plugins_loaded", None)
    return ALGORITHMS.build({"name": "rloo", "attempts": 3, "batch_size": 48})


def test_algorithm_of_ones_own(rloo):
    mask = torch.tensor([[False, True, True], [False, True, False], [False, True, False]])
    batch = Batch(
        input_ids=torch.zeros(3, 3, dtype=torch.long),
        attention_mask=torch.ones(3, 3, dtype=torch.bool),
        response_mask=mask,
        old_logprobs=torch.zeros(3, 3),
        rewards=torch.tensor([1.0, 0.0, 0.5]),
        correct=torch.tensor([True, False, False]),
        group_ids=torch.zeros(3, dtype=torch.long),
    )
    advantages, returns = rloo.estimate_advantages(batch)
    assert returns is None
    # 1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2
    assert advantages.tolist() == [[0.0, 0.75, 0.75], [0.0, -0.75, 0.0], [0.0, 0.0, 0.0]]
    ids = torch.zeros(4, dtype=torch.long)
    tokens = Tokens(
        ids=ids,
        sequence_ids=ids,
        correct=ids.bool(),
        old_logprobs=ids.float(),
        logprobs=torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        advantages=advantages[mask],
    )
    assert rloo.token_loss(tokens).tolist() == [0.75, 1.5, -2.25, 0.0]
    assert rloo.num_steps(0) == 100
    assert rloo.rollouts_per_prompt == 3


def parts() -> dict[str, str]:
    """The examples of the page for those who extend the code, by the file name in their first line."""
    page = (ROOT / "algorithms" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, flags=re.DOTALL)
    assert [name for name, _ in blocks] == [
        "actor_critic.py",
        "short_answers.py",
        "by_title.py",
        "capitals.py",
        "sums.py",
        "best_so_far.py",
    ]
    return dict(blocks)


def run_as_on_the_map(number: int, tmp_path: Path, *overrides: str, plugins: str = "") -> None:
    """The page's command with this number, in a folder with the page's files."""
    page = (ROOT / "algorithms" / "README.md").read_text(encoding="utf-8")
    line = re.findall(r"^AGENTIC_RAG_PLUGINS=.*$", page, flags=re.MULTILINE)[number]
    for name, code in parts().items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    words = shlex.split(line)
    start = words.index("python")
    plugins = words[0].partition("=")[2] + plugins
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *words[start + 1 :], *overrides, "hydra.run.dir=run", "cache_dir=cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "AGENTIC_RAG_PLUGINS": plugins},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_task_written_from_the_map_alone_is_trained_on(tmp_path):
    small = [setting for setting in SMALL if not setting.startswith(("dataset.", "env.", "algo."))]
    run_as_on_the_map(1, tmp_path, *small, "algo.num_demonstrations=16", "algo.epochs=1", "algo.batch_size=16")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["demonstrations"]["sft"] == {"wanted": 16, "found": 16, "asked": 16}
    assert summary["config"]["env"]["id"] == "Sums-v1"


def test_parts_written_from_the_map_alone_run_by_name(tmp_path):
    small = [
        setting for setting in SMALL if not setting.startswith(("dataset.", "algo.warm_start", "evaluation.every"))
    ]
    small += ["evaluation.every=2", "evaluation.num_dev_questions=4", "logger=[best_so_far]", "dataset=capitals"]
    run_as_on_the_map(0, tmp_path, *small, plugins=":capitals.py:best_so_far.py")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["algo"] == "actor_critic"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "train/value_loss" in rows[-1]
    assert rows[-1]["rollout/reward"] < 0, "the price of what was written"
    told = f"{rows[-1]['dev/exact_match']:.3f} at step 2 of actor_critic\n"
    assert (tmp_path / "run" / "best.txt").read_text() == told
    assert not (tmp_path / "run" / "tb").exists()


def test_adapters_are_trained_and_merged_as_on_the_map(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "algorithms" / "README.md").read_text(encoding="utf-8")
    lines = page.partition("## LoRA")[2].partition("```bash\n")[2].partition("```")[0].splitlines()
    for line, more in zip(lines, ([*SMALL, "cache_dir=cache"], ["probes=[]", "threads=1"], []), strict=True):
        _, _, module, *arguments = shlex.split(line, comments=True)
        monkeypatch.setattr(sys, "argv", [module, *arguments, *more])
        importlib.import_module(module).main()
    assert (tmp_path / "runs" / "lora" / "checkpoints" / "000003" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-agent" / "model.safetensors").is_file()


def test_the_map_names_what_is_there():
    page = (ROOT / "algorithms" / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "algorithms" / target).exists(), target
    for page_name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page_name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page_name}: {target}"


def test_algorithm_outside_the_repository_trains_by_name(tmp_path):
    (tmp_path / "rloo.py").write_text(ALGORITHM, encoding="utf-8")
    words = shlex.split(COMMAND)
    start = words.index("python")
    variables = dict(word.split("=", 1) for word in words[:start])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *words[start + 1 :], *SMALL, "hydra.run.dir=run", "cache_dir=cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["algo"] == "rloo"
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "rloo"]
    assert "attempts: 8" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text(encoding="utf-8")
