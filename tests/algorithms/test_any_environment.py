"""An environment that somebody registered with Gymnasium alone, from the command line to the comparison."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import calculator
import gymnasium
import numpy as np
import pytest
import torch
from calculator_script import CalculatorScript
from small_runs import Run, assert_same_run, command, resume
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from agentic_rag_env import FreeText, LiftedVectorEnv
from agentic_rag_env.registry import PLUGINS_VARIABLE
from agentic_rag_env.types import Question
from algorithms import ask, compare, evaluate, show
from algorithms.assets import ASSETS
from algorithms.learner.config import DemonstrationsConfig
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import Action
from algorithms.rollout.player import Player
from algorithms.training.build import Networks
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES, collect
from algorithms.training.demonstrations.source import Dialogue
from algorithms.training.settings import EvaluateConfig
from algorithms.training.trainer import Trainer
from algorithms.training.typed import evaluate_config

ROOT = Path(__file__).parents[2]
ENV = ["env=gymnasium", "env.id=Calculator-v1", "rollout.max_new_tokens=24", "rollout.max_tokens=128"]
SMALL = [
    *ENV, "threads=1", "num_envs=8", "checkpoint_every=1", "model.teacher=null",
    "evaluation.num_questions=16", "evaluation.num_dev_questions=4", "evaluation.every=2",
]  # fmt: skip
SKIPPED = (
    "Probes of search are skipped: source_referencing, thinking, query_rewriting, search_behaviour. The questions have "
    "no golden answers"
)
#: Where the test questions of every environment begin.
FIRST_TEST = 2_000_000_000


def numbers(seed: int) -> list[int]:
    """The two numbers that the calculator draws with a seed."""
    return np.random.default_rng(seed).integers(0, 10, size=2).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The toy student's shape and tokenizer with random weights."""
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / "tiny-student")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS / "tiny-student").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def turns(tmp_path_factory) -> Path:
    """Scripted turns: what is asked and answered for the first 2000 seeds."""
    file = tmp_path_factory.mktemp("turns") / "turns.jsonl"
    rows = [(seed, *numbers(seed)) for seed in range(2000)]
    lines = [
        {"question_id": f"Calculator-v1/{seed}", "turns": [f"<calc>{a}+{b}</calc>", f"<answer>{a + b}</answer>"]}
        for seed, a, b in rows
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory, model) -> list[str]:
    return [*SMALL, f"model.policy={model}", f"cache_dir={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def train(tmp_path_factory, small):
    """A small run on the calculator, which must succeed."""
    runs = tmp_path_factory.mktemp("runs")

    def train(name: str, *overrides: str) -> Run:
        path = runs / name
        run = command(*small, *overrides, f"hydra.run.dir={path}")
        assert run.code == 0, run.err
        return Run(path, run.code, run.out, run.err)

    return train


@pytest.fixture(scope="module")
def from_file(turns) -> list[str]:
    return [
        "algo.demonstrations.source=file", f"algo.demonstrations.path={turns}", "algo.num_demonstrations=24",
        "algo.batch_size=8", "algo.epochs=2",
    ]  # fmt: skip


def of_warm_start(overrides: list[str]) -> list[str]:
    return [each.replace("algo.", "algo.warm_start.", 1) for each in overrides]


@pytest.fixture(scope="module")
def sft(train, from_file) -> Run:
    with pytest.warns(UserWarning, match=SKIPPED):
        return train("sft", "algo=sft", *from_file)


def rows_of(file: Path) -> list[dict]:
    """A file of trajectories."""
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def seed_of(row: dict) -> int:
    return int(row["turns"][0]["info"]["question_id"].rpartition("/")[2])


# --- from the command line -----------------------------------------------------------------------------------------


def test_scripted_turns_are_learned_and_measured(sft):
    config = json.loads(json.dumps(sft.summary["config"]))
    assert {group: config[group] for group in ("dataset", "retriever", "reward")} == {
        "dataset": None, "retriever": None, "reward": None,
    }  # fmt: skip
    assert sft.summary["stages"][0]["steps"] == 6
    assert sft.summary["demonstrations"]["sft"] == {"wanted": 24, "found": 24, "asked": 24}
    # Other runs must not read them: nobody knows on what else the tasks of this environment depend.
    assert len(list((sft.path / "demonstrations").glob("*.jsonl.gz"))) == 1
    assert sft.summary["arc"] == {}
    rows = [json.loads(line) for line in (sft.path / "predictions" / "test-sft-greedy.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"Calculator-v1/{FIRST_TEST + place}" for place in range(16)]
    assert {row["dataset"] for row in rows} == {"Calculator-v1"}
    for row in rows_of(next(sft.path.glob("trajectories/train-*"))):
        a, b = numbers(seed_of(row))
        assert row["prompt"] == f"{a} + {b} = ?\n"
        assert [turn["action"] for turn in row["turns"]] == [f"<calc>{a}+{b}</calc>", f"<answer>{a + b}</answer>"]
        assert row["turns"][0]["observation"] == f"\n{a + b}\n"
        assert row["correct"] is True


POLICY_GRADIENT = ["algo.batch_size=8", "algo.num_minibatches=1", "algo.steps=2"]


@pytest.fixture(scope="module")
def grpo_overrides(from_file) -> list[str]:
    warm_start = ["algo.warm_start=sft", *of_warm_start(from_file)]
    return ["algo=grpo", *POLICY_GRADIENT, "algo.rollouts_per_prompt=4", *warm_start]


@pytest.fixture(scope="module")
def grpo(train, grpo_overrides) -> Run:
    return train("grpo", *grpo_overrides)


def test_the_environment_decides_what_is_correct_for_grpo_and_dgpo(train, sft, grpo, from_file):
    dgpo = train(
        "dgpo", "algo=dgpo", f"model.teacher={sft.path}", *POLICY_GRADIENT, *of_warm_start(from_file),
        "algo.critic_warmup_steps=0",
    )  # fmt: skip
    assert [stage["name"] for stage in dgpo.summary["stages"]] == ["kd", "dgpo"]
    assert set(dgpo.summary["evaluation"]) == {"raw", "kd", "dgpo", "teacher"}
    for run in (grpo, dgpo):
        rows = [row for file in run.path.glob("trajectories/test-*") for row in rows_of(file)]
        assert len(rows) == 16 * 2 * len(run.summary["evaluation"])
        for row in rows:
            said = re.search(r"<answer>(.*?)</answer>", row["turns"][-1]["action"], re.DOTALL)
            assert row["correct"] is (said is not None and said[1].strip() == str(sum(numbers(seed_of(row)))))
            assert row["reward"] == float(row["correct"])


def test_a_run_that_broke_off_goes_on_as_if_nothing_had_happened(train, grpo, grpo_overrides, small):
    train_step, steps, path = Trainer._train_step, [], grpo.path.with_name("broken")

    def breaking(self, *args):
        steps.append(1)
        if len(steps) == 8:  # the second of GRPO, after 6 of SFT
            raise KeyboardInterrupt
        return train_step(self, *args)

    with patch.object(Trainer, "_train_step", breaking):
        assert command(*small, *grpo_overrides, f"hydra.run.dir={path}").code == 130
    assert not (path / "summary.json").exists()
    assert_same_run(resume(path), grpo)


def test_a_checkpoint_is_measured_as_the_run_measured_it(sft, tmp_path, capsys):
    def score(*overrides: str) -> Run:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        given = ["evaluate", f"checkpoint={sft.path}", "evaluation.num_questions=16", "threads=1", "num_envs=8"]
        code: int | str | None = 0
        try:
            with patch.object(sys, "argv", [*given, *overrides, f"hydra.run.dir={path}"]):
                evaluate.main()
        except SystemExit as end:
            code = end.code
        return Run(path, code, *capsys.readouterr())

    with pytest.warns(UserWarning, match=SKIPPED):
        again = score()
    assert again.summary["evaluation"]["checkpoint"] == sft.summary["evaluation"]["sft"]
    assert "16 of the 1000 questions of Calculator-v1, split test" in again.out
    # Single settings change the environment; probes that need no passages are still to be had.
    changed = ["dataset.split=dev", "env.num_dev=5", "env.kwargs={largest: 0}"]
    dev = score(*changed, "evaluation.temperatures=[0]", "probes=[]")
    rows = rows_of(dev.path / "trajectories" / "dev-checkpoint-greedy.jsonl.gz")
    assert [seed_of(row) for row in rows] == [1_000_000_000 + place for place in range(5)]
    assert {row["prompt"] for row in rows} == {"0 + 0 = ?\n"}
    # The checkpoint plays our own environment, too.
    ours = [
        "env=agentic_rag",
        "probes=[]",
        "dataset.num_questions=4",
        "dataset.num_passages=150",
        "rollout.max_tokens=512",
    ]
    assert len(rows_of_predictions(score(*ours, "evaluation.num_questions=3", "evaluation.temperatures=[0]"))) == 3
    for given, message in (
        ("dataset=jsonl", "env=gymnasium brings its own questions, so dataset=jsonl would have no effect"),
        ("dataset.num_questions=4", "so dataset.num_questions would have no effect; leave it out"),
        ("retriever=bm25", "so retriever=bm25 would have no effect"),
        ("reward=f1", "so reward=f1 would have no effect"),
    ):
        refused = score(given)
        assert refused.code == 1, given
        assert message in refused.err


def rows_of_predictions(run: Run) -> list[dict]:
    (file,) = (run.path / "predictions").glob("*-greedy.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_is_shown_and_compared(sft, grpo, tmp_path, capsys):
    show.main([str(sft.path), "--limit", "2"])
    a, b = numbers(FIRST_TEST)
    assert f"Question: {a} + {b} = ?\n" in capsys.readouterr().out
    assert f"{a} + {b} = ?" in (sft.path / "trajectories.html").read_text(encoding="utf-8")
    compare.main([str(sft.path), str(grpo.path), "--out", str(tmp_path / "compared")])
    figures = json.loads((tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8"))
    assert {"sft", "grpo"} <= set(re.findall(r'"(sft|grpo)"', json.dumps(figures)))
    assert "comparison.html" in capsys.readouterr().out


def test_the_module_that_registers_it_is_a_plug_in(tmp_path, model):
    command = ["-m", "algorithms.evaluate", f"checkpoint={model}", *ENV, "probes=[]", "evaluation.num_questions=2"]
    command += ["threads=1", "num_envs=2", "evaluation.temperatures=[0.0]"]
    plain = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    plugged = plain | {PLUGINS_VARIABLE: calculator.__file__}
    done = [
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for environment in (plain, plugged)
    ]
    assert done[0].returncode == 1
    assert "Gymnasium can't make 'Calculator-v1'" in done[0].stderr
    assert "commands import the files that AGENTIC_RAG_PLUGINS names." in done[0].stderr
    assert done[1].returncode == 0, done[1].stderr
    assert "2 of the 1000 questions of Calculator-v1, split test" in done[1].stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dataset=tiny"], "env=gymnasium brings its own questions, so dataset=tiny would have no effect; leave it"),
        (["retriever=static"], "so retriever=static would have no effect; leave it out."),
        (["reward=f1"], "so reward=f1 would have no effect; leave it out."),
        (["retriever.k1=1"], "There is no setting retriever.k1"),
        (["evaluation.corpus=shuffled"], "there are no passages for evaluation.corpus=shuffled to change"),
        (["env.id=a_module:Calculator-v1"], "id must be a name such as 'My-v0' alone; name the module"),
        (["env.id=Calculatr-v1"], "Gymnasium can't make 'Calculatr-v1'"),
        (["env.kwargs={smallest: 1}"], "Calculator-v1 can't be made with kwargs={'smallest': 1}"),
        (["env.num_test=0"], "num_test must be an integer of at least 1, got 0"),
        (["env.split_argument=split"], "Calculator-v1 can't be made with kwargs={'split': 'train'}"),
        (["algo=maskable_ppo"], "An outside learner needs env=agentic_rag, got a LiftedVectorEnv."),
        (["algo=sft", "algo.demonstrations.source=expert"], "source=expert searches for gold passages"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(given, message, tmp_path, model):
    run = command(*SMALL, f"model.policy={model}", *given, f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path}")
    assert run.code == 1
    assert message in run.err
    assert not (tmp_path / "run").exists()


def test_what_our_own_environment_needs_is_named(tmp_path):
    run = command("~dataset", "~reward", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "env=agentic_rag needs dataset=NAME, reward=NAME." in run.err
    run = command("env=gymnasium", f"hydra.run.dir={tmp_path / 'run'}")
    assert "env.id has no default and must be set" in run.err


def test_it_cant_be_asked_a_question_of_ones_own(sft, capsys):
    for given in ([f"checkpoint={sft.path}"], ["checkpoint=tiny-student", *ENV]):
        with patch.object(sys, "argv", ["ask", *given, "question=Who?"]), pytest.raises(SystemExit):
            ask.main()
        assert "env=gymnasium brings its own questions, so it can't be asked one of yours" in capsys.readouterr().err


# --- demonstrations and players ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(model):
    """The networks, the calculators and the rollout settings of an evaluation."""
    given = {"evaluation": {}, "num_envs": 4, "env": {"name": "gymnasium", "id": "Calculator-v1"}}
    config = evaluate_config(vars(EvaluateConfig()) | given, str(model), {})
    return Networks(config), LiftedVectorEnv("Calculator-v1", 4, range(40)), config.rollout


def test_a_plug_in_source_reads_the_prompt_and_may_give_up(played):
    assert DEMONSTRATION_SOURCES.get("calculator_script").factory is CalculatorScript
    source = CalculatorScript(DemonstrationsConfig(source="calculator_script"), *played)
    found = collect(source, 40, max_questions=40, seed=0)
    zeros = [0 in numbers(seed) for seed in range(40)]
    assert (len(found.trajectories), found.dropped) == (40 - sum(zeros), {"zero": sum(zeros)})
    assert sum(zeros) == 5
    assert all(one.correct and len(one.turns) == 2 for one in found.trajectories)


def test_an_endpoint_is_told_the_prompt(played):
    config = DemonstrationsConfig(source="endpoint", url="http://127.0.0.1:9/v1", model="m")
    source = DEMONSTRATION_SOURCES.get("endpoint").factory(config, *played)
    dialogue = Dialogue(0, Question("q", "Calculator-v1, seed 3", ()), "1 + 2 = ?\n", ["<calc>1+2</calc>"], ["\n3\n"])
    assert source._messages(dialogue) == [
        {"role": "user", "content": "1 + 2 = ?\n"},
        {"role": "assistant", "content": "<calc>1+2</calc>"},
        {"role": "user", "content": "3"},
    ]


class Endless(gymnasium.Env[str, str]):
    """Neither ends nor says anything."""

    metadata = {"render_modes": [], "action_ends": ["."]}  # noqa: RUF012
    observation_space = action_space = FreeText()  # type: ignore[assignment]

    def reset(self, *, seed=None, options=None):
        return "Go on", {}

    def step(self, action):
        return "", 0.0, False, False, {}


class Mute:
    """An engine whose every action is an end of text, and nothing else."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.config, self.num_rows, self.computed_tokens = tokenizer, RolloutConfig(max_tokens=40), 1, 0
        self.is_open = False

    def open(self, row, ids, uniforms=None):
        self.is_open = True

    append = open

    def write(self):
        ids = np.array([self.tokenizer.eos_token_id])
        return [Action(0, ids, np.zeros(1, dtype=np.float32), "", ends_text=True)] if self.is_open else []

    def close(self, rows):
        self.is_open = False


def test_an_episode_in_which_nothing_is_said_ends(played):
    gymnasium.register("Endless-v0", entry_point=Endless)
    networks, _, _ = played
    (trajectory,), _ = Player(Mute(networks.tokenizer), LiftedVectorEnv("Endless-v0", 1, range(1))).rollout(
        [0], seed=(0,)
    )
    assert len(trajectory.turns) == 40 - 3  # of the prompt; without a reply, an end of text is read
    assert trajectory.ending == "out_of_tokens"
    assert trajectory.truncated
