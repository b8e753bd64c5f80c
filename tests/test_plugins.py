"""Parts of other packages and of single files: known by name without a changed line here, and refused with a reason."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import pytest
from omegaconf import OmegaConf

from agentic_rag_env.errors import ConfigurationError, UnknownNameError
from agentic_rag_env.registry import PLUGINS_VARIABLE, REWARDS, Registry
from algorithms.learner.algorithm import ALGORITHMS

ROOT = Path(__file__).parents[1]
PLUGIN = Path(__file__).parent / "plugin"
PARTS = {"algo": "rejection", "dataset": "capitals", "env": "turn_cost", "retriever": "title", "reward": "brevity"}
SMALL = [
    "threads=1", "num_envs=8", "rollout.max_new_tokens=16", "rollout.max_tokens=256", "probes=[]",
    "evaluation.num_questions=4", "evaluation.every=0", "evaluation.temperatures=[0.0]",
]  # fmt: skip


# --- an installed package ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the package in `tests/plugin`."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")  # because the build writes there
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run_python(cwd: Path, *arguments: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, (*paths, ROOT)), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_part_of_each_kind_by_name_from_the_command_line(site, tmp_path):
    chosen = [f"{group}={name}" for group, name in PARTS.items()]
    settings = ["algo.steps=2", "algo.batch_size=8", "dataset.num_questions=5", "env.cost=0.25", "reward.price=0.5"]
    command = ["-m", "algorithms.run", *chosen, *settings, *SMALL, "hydra.run.dir=run", "cache_dir=cache"]
    done = run_python(tmp_path, *command, paths=(site,))
    assert done.returncode == 0, done.stderr
    config = OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")
    assert {group: config[group].name for group in PARTS} == PARTS
    assert config.retriever == {"name": "title", "ignore_case": True}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["algo"] == "rejection"
    assert [stage["name"] for stage in summary["stages"]] == ["rejection"]
    (episodes,) = (tmp_path / "run" / "trajectories").glob("test-rejection-*")
    rows = [json.loads(line) for line in gzip.decompress(episodes.read_bytes()).decode().splitlines()]
    assert [row["turns"][0]["info"]["question_id"] for row in rows] == ["France", "Italy", "Norway", "Peru"]
    # Nobody is right: each turn costs 0.25, and of three turns each character 0.5.
    assert all(row["reward"] <= -0.25 * len(row["turns"]) for row in rows)


@pytest.mark.nightly  # the run above has composed them too
def test_the_parts_are_among_the_options_and_settings(site, tmp_path):
    chosen = [f"{group}={name}" for group, name in PARTS.items()]
    done = run_python(tmp_path, "-m", "algorithms.run", *chosen, "--cfg", "job", paths=(site,))
    config = OmegaConf.create(done.stdout)
    assert {group: config[group].name for group in PARTS} == PARTS
    assert config.env == {"name": "turn_cost", "cost": 0.01, "max_turns": 2}
    done = run_python(tmp_path, "-m", "algorithms.run", "--help", paths=(site,))
    for group, name in PARTS.items():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{group}: "))
        assert name in line
    done = run_python(tmp_path, "-m", "algorithms.run", "reward=brevity", "reward.prise=1", paths=(site,))
    assert done.returncode == 1
    assert "prise" in done.stderr
    assert "BrevityConfig" in done.stderr


def test_the_environment_alone_finds_them_too(site, tmp_path):
    code = """
import sys, gymnasium, agentic_rag_env
env = gymnasium.make("AgenticRAG-v0", dataset="capitals", retriever="title", reward={"name": "brevity", "price": 0.25})
env.reset(options={"question_index": 3})
print(env.step("<search> PERU </search>")[4]["passages"][0].text)
print(env.step("<answer>Lima</answer>")[1], "torch" in sys.modules)
"""
    done = run_python(tmp_path, "-c", code, paths=(site,))
    assert done.stdout.splitlines() == ["The capital of Peru is Lima.", str(1 - 0.25 * (23 + 21)) + " False"]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The metadata of an installed package whose module is missing."""
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[agentic_rag_env.toy]\ncogs = cogs_of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_broken_package_is_named_until_it_is_mended(broken):
    toys = Registry("toy")
    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            toys.names()
        assert str(caught.value) == (
            "The plug-in 'cogs' of the package 'broken-plugin' (entry point agentic_rag_env.toy: cogs_of_nobody) can't "
            "be loaded: ModuleNotFoundError: No module named 'cogs_of_nobody'. Mend the package, or uninstall it."
        )
    (broken / "cogs_of_nobody.py").write_text("")
    assert toys.names() == []


# --- a file --------------------------------------------------------------------------------------------------------

CONSTANT = """
from __future__ import annotations
from dataclasses import dataclass
from agentic_rag_env import REWARDS

@dataclass
class {name}Config:
    value: float = 0.5

@REWARDS.register("{name}", {name}Config)
class {name}:
    def __init__(self, config: {name}Config) -> None:
        self.value = config.value

    def __call__(self, outcome) -> float:
        return self.value
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes files into a folder, names them as plug-ins, and lets the registries begin anew."""

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setenv(PLUGINS_VARIABLE, os.pathsep.join(str(tmp_path / f"{name}.py") for name in files))

    monkeypatch.chdir(tmp_path)
    for registry in (REWARDS, ALGORITHMS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_plugins_loaded", None)
    return write


def test_files_are_plug_ins(load):
    load(mine=CONSTANT.format(name="mine"), random=CONSTANT.format(name="other"))  # named as a standard module
    assert {"mine", "other", "exact_match"} <= set(REWARDS.names())
    env = gymnasium.make("AgenticRAG-v0", reward={"name": "other", "value": 0.25})
    env.reset(seed=0)
    assert env.step("<answer> x </answer>")[1] == 0.25
    with pytest.raises(UnknownNameError, match="Did you mean 'mine'"):
        REWARDS.build("mein")


def test_a_file_is_loaded_once_and_found_from_where_one_is(load, tmp_path, monkeypatch):
    load(counting="from pathlib import Path\nwith Path('log').open('a') as log: log.write('x')\n")
    monkeypatch.setenv(PLUGINS_VARIABLE, os.pathsep.join(["", "counting.py", "./counting.py"]))
    for registry in (REWARDS, Registry("toy"), Registry("toy")):
        registry.names()
    assert (tmp_path / "log").read_text() == "x"


def test_a_file_that_is_named_later_is_loaded_then(load):
    """As in a notebook: the variable is set after an environment was made."""
    load(first=CONSTANT.format(name="first"))
    assert "first" in REWARDS.names()
    load(second=CONSTANT.format(name="second"))
    assert REWARDS.build("second").value == 0.5


def test_a_plug_in_may_look_names_up(load):
    load(curious=CONSTANT.format(name="late") + "\nassert {'f1', 'late'} <= set(REWARDS.names())\n")
    assert "late" in REWARDS.names()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", r"SyntaxError: invalid syntax \(bad\.py, line 1\)"),
        (
            "from agentic_rag_env.registry import REWARDS\nfrom agentic_rag_env.rewards import answer_reward\n"
            "def mine(answer, golden_answers): return 0.0\nREWARDS.register('f1')(answer_reward(mine))",
            "reward 'f1' is already registered by agentic_rag_env.answers; choose another",
        ),
        (CONSTANT.format(name="f1"), "reward 'f1' is already registered by agentic_rag_env.answers; choose another"),
        (
            "from agentic_rag_env import REWARDS\n@REWARDS.register('bare')\nclass Bare: ...",
            r"reward 'bare' must be registered with a dataclass of its settings \(an empty one .*\), got None",
        ),
        ("from agentic_rag_env import REWARDS\nREWARDS.register('x', dict)(print)", "got <class 'dict'>"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason_each_time(load, text, reason):
    load(bad=text)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"bad.py', named in {PLUGINS_VARIABLE}, can't be .*{reason}"):
            REWARDS.get("exact_match")


ALGORITHM_FILE = """
from dataclasses import dataclass
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, CriticConfig, DemonstrationConfig

@dataclass(kw_only=True)
class ImitateConfig({demonstration_config}):
    "Settings of `Imitate`."

@ALGORITHMS.register("imitate", ImitateConfig)
class Imitate(Algorithm):
    trains_on = frozenset({{"teacher"}})

    def num_steps(self, num_demonstrations):
        return num_demonstrations // self.config.batch_size

    def token_loss(self, tokens):
        return -tokens.logprobs

@dataclass(kw_only=True)
class ValuedConfig({critic_config}):
    "Settings of `Valued`."

@ALGORITHMS.register("valued", ValuedConfig)
class Valued(Algorithm):
    needs = frozenset({{"values"}})

    def num_steps(self, num_demonstrations):
        return 2

    def estimate_advantages(self, batch):
        return ops.gae(batch.token_rewards, batch.values, batch.response_mask, 1.0, 1.0)

    def token_loss(self, tokens):
        return -tokens.advantages * tokens.logprobs

    def {value_loss}(self, tokens):
        return (tokens.values - tokens.returns).square()
"""
WHOLE = {
    "demonstration_config": "DemonstrationConfig", "critic_config": "CriticConfig", "value_loss": "value_loss",
}  # fmt: skip


def test_a_file_with_algorithms_that_need_a_teacher_and_a_critic_trains(load, tmp_path):
    load(mine=ALGORITHM_FILE.format(**WHOLE))
    stages = ["algo=valued", "+algo@algo.warm_start=imitate", "algo.warm_start.num_demonstrations=8"]
    sizes = ["algo.batch_size=8", "algo.warm_start.batch_size=4", "dataset.num_questions=40"]
    command = ["-m", "algorithms.run", *stages, *sizes, *SMALL, "hydra.run.dir=run", "cache_dir=cache"]
    done = run_python(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert [(stage["name"], stage["steps"]) for stage in summary["stages"]] == [("imitate", 2), ("valued", 2)]
    assert summary["demonstrations"]["imitate"]["found"] == 8
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["imitate", "imitate", "valued", "valued"]
    assert ["train/value_loss" in row for row in rows] == [False, False, True, True]
    assert ["rollout/exact_match" in row for row in rows] == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "without", "said"),
    [
        ("imitate", {"demonstration_config": "AlgorithmConfig"},
         "Imitate trains on the teacher's trajectories, so its settings, ImitateConfig, must extend "
         "DemonstrationConfig of algorithms.learner.algorithm."),
        ("valued", {"critic_config": "AlgorithmConfig"},
         "Valued needs values, so its settings, ValuedConfig, must extend CriticConfig of "
         "algorithms.learner.algorithm."),
        ("valued", {"value_loss": "loss_of_values"},
         "Valued must define value_loss, since it needs values; see Algorithm.value_loss in "
         "algorithms.learner.algorithm."),
    ],
)  # fmt: skip
def test_what_an_algorithm_in_a_file_lacks_is_said_at_the_start(load, tmp_path, name, without, said):
    load(mine=ALGORITHM_FILE.format(**WHOLE | without))
    command = ["-m", "algorithms.run", f"algo={name}", *SMALL, "hydra.run.dir=run", "cache_dir=cache"]
    done = run_python(tmp_path, *command)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"ConfigurationError: {said}"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_frozen_settings_of_a_file_take_values_from_the_command_line(load, tmp_path):
    load(calm=CONSTANT.format(name="calm").replace("@dataclass", "@dataclass(frozen=True)"))
    assert REWARDS.build({"name": "calm", "value": 0.75})(None) == 0.75
    done = run_python(tmp_path, "-m", "algorithms.run", "reward=calm", "reward.value=0.25", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout).reward == {"name": "calm", "value": 0.25}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('value: Literal["a", "b"] = "a"',
         "has the type Literal[a, b], which a command line can't hold; use str, a number, or a list or mapping of "
         "them, and one_of in __post_init__."),
        ('value: int = "a"',
         "can't be one of a command line: Value 'a' of type 'str' could not be converted to Integer."),
    ],
)  # fmt: skip
def test_a_setting_that_a_command_line_cannot_hold_is_named_with_its_file(load, tmp_path, setting, said):
    text = CONSTANT.format(name="picky").replace("value: float = 0.5", setting)
    load(picky=text.replace("import annotations", "import annotations\nfrom typing import Literal"))
    done = run_python(tmp_path, "-m", "algorithms.run", "--cfg", "job")
    assert done.returncode == 1
    place = f"reward 'picky' ({tmp_path / 'picky.py'})"
    assert done.stderr.splitlines() == [f"ConfigurationError: {place}: the setting value {said}"]


@pytest.mark.parametrize("name", ["missing.py", "folder", "notes.txt"])
def test_what_is_no_python_file_is_refused(load, tmp_path, monkeypatch, name):
    load()
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").touch()
    monkeypatch.setenv(PLUGINS_VARIABLE, name)
    with pytest.raises(ConfigurationError, match=f"{PLUGINS_VARIABLE} names '{name}', which is no Python file"):
        REWARDS.names()


@pytest.mark.filterwarnings("ignore:'algorithms.run' found in sys.modules:RuntimeWarning")
def test_a_command_says_so_in_a_line(load, capsys):
    load(bad="1 / 0")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("algorithms.run")
    assert end.value.code == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("ConfigurationError: The plug-in ")
    assert message.endswith("can't be loaded: ZeroDivisionError: division by zero")


def test_settings_of_a_part_that_has_none_are_empty():
    @dataclass
    class Nothing:
        pass

    toys = Registry("toy")
    toys.register("spinner", Nothing)(lambda config: ("spinning", config))
    assert toys.build("spinner") == ("spinning", Nothing())
    with pytest.raises(ConfigurationError, match="has no setting 'speed'"):
        toys.build({"name": "spinner", "speed": 2})
