"""The configuration: every name in it composes and builds, and a wrong one is refused with the right ones beside it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gymnasium.vector import AutoresetMode
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from small_runs import command

import conf
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS
from agentic_rag_env.types import Passage
from agentic_rag_env.vector import BringsQuestions
from algorithms.assets import ASSETS
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, OptimizerConfig
from algorithms.learner.config import LearnerConfig, LoraConfig
from algorithms.learner.networks import load_tokenizer
from algorithms.rollout.config import RolloutConfig
from algorithms.training.build import build_stages
from algorithms.training.compose import explanation
from algorithms.training.schemas import by_group, register_schemas
from algorithms.training.settings import EvaluationConfig, ModelConfig, RunConfig
from algorithms.training.typed import run_config

ROOT = Path(__file__).parents[3]
CONF = Path(conf.__file__).parent
TINY_STUDENT = ASSETS / "tiny-student"
PAPER = ["+experiment=paper"]
REGISTRIES = (ALGORITHMS, ENVS, RETRIEVERS, DATASETS, REWARDS)
NAMES = [(registry, name) for registry in REGISTRIES for name in registry.names()]
DEFAULT_GROUPS = ("algo", "env", "dataset", "retriever", "reward", "model", "stages")
FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))

register_schemas()


def configure(*overrides: str) -> RunConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return run_config(compose("config", list(map(by_group, overrides))))


@pytest.fixture
def files(tmp_path):
    """What parts without a usable default need to be told."""
    for name in ("q.jsonl", "train.jsonl"):
        (tmp_path / name).write_text('{"id": "q", "question": "Who?", "golden_answers": ["I"]}\n')
    (tmp_path / "c.jsonl").write_text('{"id": "1", "contents": "A\\nI am."}\n')
    corpus = f"dataset.corpus={tmp_path / 'c.jsonl'}"
    return {
        "jsonl": [f"dataset.questions={tmp_path / 'q.jsonl'}", corpus],
        "gymnasium": ["env.id=AgenticRAG-v0"],
        "http": ["retriever.url=http://127.0.0.1:9/retrieve"],
        "rerank": ["retriever.model=no-such-folder"],
        "sharded": ["retriever.shards=[http://127.0.0.1:9,http://127.0.0.1:8]"],
        "benchmark": [f"dataset.path={tmp_path / 'train.jsonl'}"],
        "mixture": [f"+dataset.sources.one={{name: benchmark, path: {tmp_path / 'train.jsonl'}}}"],
    }


# --- every name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("registry", "name"), NAMES, ids=[f"{registry.group}={name}" for registry, name in NAMES])
def test_every_registered_name_composes_and_builds(registry, name, files):
    config = configure(f"{registry.group}={name}", *files.get(name, []))
    spec = getattr(config, registry.group)
    assert spec["name"] == name
    if registry is ALGORITHMS:
        if issubclass(registry.get(name).factory, Algorithm):
            assert build_stages(spec)[-1].name == name
        return
    if name == "rerank":  # with a network of its own in its own test
        return
    context = {
        ENVS: {"num_envs": 2, "autoreset_mode": AutoresetMode.DISABLED, "tokenizer": load_tokenizer(TINY_STUDENT)},
        RETRIEVERS: {"corpus": [Passage("1", "A\nI am.")]},
    }.get(registry, {})
    if registry is ENVS and issubclass(registry.get(name).config, BringsQuestions):
        context = {"num_envs": 2}
    built = registry.build(spec, **context)
    if registry is DATASETS:
        assert len(built) > 0
    if registry is ENVS:
        prompts, _ = built.reset(seed=0)
        assert len(prompts) == 2


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_preset_composes_into_known_settings(file):
    group, option = file.parent.name, file.stem
    choice = f"{group}={option}" if group in DEFAULT_GROUPS else f"+{group}={option}"
    config = configure(choice)
    assert config.algo["name"] == "maskable_ppo" or build_stages(config.algo)


def test_the_baseline_that_the_paper_preset_names():
    config = configure("algo=ppo", "algo.warm_start=null", *PAPER)
    (stage,) = build_stages(config.algo)
    assert stage.name == "ppo"
    assert stage.config.steps == 1000
    assert config.env["prompt"] == "search_r1"
    assert config.dataset["members"]["train"] == ["nq", "hotpotqa"]
    assert len(config.dataset["sources"]) == 7


def test_the_defaults_are_those_of_the_dataclasses():
    config = configure()
    assert config.learner == LearnerConfig()
    assert config.rollout == RolloutConfig()
    assert config.evaluation == EvaluationConfig()
    assert config.model == ModelConfig()
    for registry in REGISTRIES:
        name = getattr(config, registry.group)["name"]
        settings = registry.get(name).config
        if settings is not None and registry is not ALGORITHMS:
            assert getattr(config, registry.group) == {"name": name, **dataclasses.asdict(settings())}
    stages = build_stages(config.algo)
    assert [stage.name for stage in stages] == ["kd", "dgpo"]
    for stage in stages:
        expected = type(stage.config)(warm_start=stage.config.warm_start)
        assert dataclasses.asdict(stage.config, dict_factory=_with_tuples) == dataclasses.asdict(
            expected, dict_factory=_with_tuples
        )


def _with_tuples(items):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in items}


# --- overrides reach the objects -------------------------------------------------------------------------------------


def stages(*overrides: str):
    return build_stages(configure(*overrides).algo)


def test_settings_of_every_depth_arrive():
    kd, dgpo = stages(
        "algo.steps=7",
        "algo.optimizer.learning_rate=0.25",
        "algo.critic_optimizer.betas=[0.5,0.75]",
        "algo.warm_start.epochs=3",
        "algo.warm_start.optimizer.schedule=constant",
    )
    assert dgpo.config.steps == 7
    assert isinstance(dgpo.config.optimizer, OptimizerConfig)
    assert dgpo.config.optimizer.learning_rate == 0.25
    assert tuple(dgpo.config.critic_optimizer.betas) == (0.5, 0.75)
    assert kd.config.epochs == 3
    assert kd.config.optimizer.schedule == "constant"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algo.warm_start=null"], ["dgpo"]),
        (["algo.warm_start=sft"], ["sft", "dgpo"]),
        (["algo@algo.warm_start=sft", "algo.warm_start.epochs=3"], ["sft", "dgpo"]),
        (["algo=ppo"], ["ppo"]),
        (["algo=ppo", "algo.warm_start=kd", "algo.warm_start.epochs=3"], ["kd", "ppo"]),
        (["algo=ppo", "+algo@algo.warm_start=kd", "algo.warm_start.epochs=3"], ["kd", "ppo"]),
        (["algo=kd", "algo.warm_start=dgpo"], ["kd", "dgpo", "kd-2"]),  # the inverted order, after a cold start
        (["algo=kd", "algo.warm_start=dgpo", "algo.warm_start.warm_start=null"], ["dgpo", "kd"]),
        (["algo=kd", "algo.warm_start=dgpo", "algo.warm_start.warm_start=sft"], ["sft", "dgpo", "kd"]),
    ],
)
def test_stages_are_a_matter_of_configuration(overrides, expected):
    built = stages(*overrides)
    assert [stage.name for stage in built] == expected
    if "algo.warm_start.epochs=3" in overrides:
        assert built[0].config.epochs == 3


@pytest.mark.parametrize(
    ("given", "composed"),
    [
        ("algo.warm_start=kd", "algo@algo.warm_start=kd"),
        ("+algo@algo.warm_start=kd", "algo@algo.warm_start=kd"),
        ("algo.warm_start.warm_start=kd,sft", "algo@algo.warm_start.warm_start=kd,sft"),
        *((same, same) for same in ("algo.warm_start=null", "algo.warm_start=kd,null", "algo.warm_start=null,kd")),
        *((same, same) for same in ("algo.warm_start={name: kd}", "algo.warm_start.epochs=3", "algo=kd", "-m")),
    ],
)
def test_a_warm_start_given_by_its_name_is_an_option(given, composed):
    assert by_group(given) == composed


# --- what is wrong is refused ----------------------------------------------------------------------------------------

BAD = [
    ("algo=dgpp", ["Unknown algo 'dgpp'. Did you mean 'dgpo'?", "kd", "ppo", "sft"]),
    ("retriever=bm52", ["Unknown retriever 'bm52'. Did you mean 'bm25'?", "http"]),
    ("algo.kl_cof=1", ["There is no setting algo.kl_cof. Did you mean 'kl_coef'?"]),
    ("algo.warm_start.epoch=1", ["algo 'kd' has no setting 'epoch'. Did you mean 'epochs'?"]),
    ("evaluation.evry=1", ["There is no setting evaluation.evry. Did you mean 'every'?"]),
    ("retriver=bm25", ["There is no setting retriver. Did you mean 'retriever'?"]),
    ("algo@algo.warm_start=dkpo", ["Unknown algo 'dkpo'"]),
    ("algo.warm_start=dkpo", ["Unknown algo 'dkpo'", "Known: dgpo, "]),
    ("stages=papr", ["Unknown stages 'papr'. Did you mean 'paper'?"]),
    ("algo.steps=many", ["algo.steps must be a whole number, got 'many'"]),
    ("algo.selective=3.5", ["3.5", "bool", "algo.selective"]),
    ("algo.optimizer.learning_rate=fast", ["algo.optimizer.learning_rate must be a number, got 'fast'"]),
    ("algo.optimizer.betas=0.9", ["betas", "0.9"]),
    ("seed=x", ["seed must be a whole number, got 'x'"]),
    ("seed=1.5", ["seed must be a whole number, got 1.5"]),
    ("logger=jsonl", ["logger is a list: write logger=[jsonl]"]),
    ("algo.optimizer.betas='[0.9,0.99]'", ["a list: leave out the inner quotes, algo.optimizer.betas=[0.9,0.99]."]),
    ("algo.optimizer.betas=[0.9", ["algo.optimizer.betas=[0.9 can't be read"]),
    ("probes=null", ["probes is a list, which can't be null: write probes=[] for none."]),
    ("seed=null", ["seed can't be null; leave it out for its default."]),
    ("method=kd", ["No method is chosen by default. Write +method=kd."]),
    ("experiment=main_table", ["Write +experiment=main_table."]),
    ("runs/x", ["'runs/x' has no '='; write name=value."]),
    ("algo.steps=-3", ["steps must be above 0, got -3"]),
    ("algo.warm_start.epochs=0", ["epochs must be an integer of at least 1, got 0"]),
    ("algo.num_minibatches=1000", ["num_minibatches must be at most batch_size", "1000"]),
    ("algo.optimizer.schedule=linear", ["schedule must be one of constant, cosine, got 'linear'"]),
    ("algo.kl_estimator=k4", ["kl_estimator must be one of k1, k2, k3, exact, got 'k4'"]),
    ("algo.warm_start={name:sft}", ["algo 'sft' has no setting 'kl_coef'"]),
    ("+algo.foo=1", ["algo 'dgpo' has no setting 'foo'"]),
    ("+foo=1", ["no setting foo", "seed"]),
    ("+model.polcy=x", ["no setting model.polcy", "Did you mean 'policy'"]),
    ("learner.precision=float8", ["precision must be one of", "got 'float8'"]),
    ("rollout.top_p=0", ["top_p must be in (0, 1], got 0"]),
    ("rollout.decode_during_search=-1", ["decode_during_search must be at least 0, got -1"]),
    ("rollout.cuda_graphs=yes", ["cuda_graphs must be one of off, auto, on, got 'yes'"]),
    ("evaluation.num_questions=0", ["num_questions must be an integer of at least 1, or None for all, got 0"]),
    ("evaluation.temperatures=[]", ["temperatures must be one or more numbers of at least 0, got []"]),
    ("evaluation.num_dev_questions=0", ["num_dev_questions must be an integer of at least 1, got 0"]),
    ("seed=-1", ["seed must be in [0, 2**32), got -1"]),
    ("num_envs=0", ["num_envs must be an integer of at least 1, got 0"]),
    ("checkpoint_every=0", ["checkpoint_every must be an integer of at least 1, got 0"]),
    ("threads=0", ["threads must be an integer of at least 1, or None, got 0"]),
    ("max_retriever_error_fraction=2", ["max_retriever_error_fraction must be in [0, 1], got 2"]),
    ("dataset=jsonl", ["dataset.questions has no default and must be set"]),
    ("seed=${sed}", ["sed"]),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[override for override, _ in BAD])
def test_a_wrong_setting_is_refused_in_a_few_words(override, expected, tmp_path):
    run = command(override, f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert run.out == ""
    assert "Traceback" not in run.err
    message = run.err.partition("\n\nSet the environment variable")[0]
    for part in expected:
        assert part in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_name_that_is_known_is_not_called_unknown():
    missing = MissingConfigException("Could not load 'algo/dgpo'.", "algo/dgpo", ["dgpo", "kd"])
    assert explanation(missing) is None
    missing.missing_cfg_file = "algo/dgpp"
    assert str(explanation(missing)).startswith("Unknown algo 'dgpp'. Did you mean 'dgpo'?")


def test_stages_that_lead_back_to_themselves_are_refused():
    class Endless(dict):
        def __getitem__(self, key):
            return self if key == "warm_start" else super().__getitem__(key)

        def items(self):
            return [("name", "ppo"), ("warm_start", self)]

    with pytest.raises(ConfigurationError, match=r"goes on without end; set warm_start=null"):
        build_stages(Endless(name="ppo", warm_start=None))


# --- for a newcomer --------------------------------------------------------------------------------------------------


def test_help_says_what_it_is_how_to_use_it_and_what_there_is():
    run = command("--help")
    assert run.code == 0
    lines = run.out.splitlines()
    assert lines[0] == "Train a search agent, measure it, and write everything into a run directory."
    assert any("python -m algorithms.run resume=outputs/dgpo/<time>" in line for line in lines)
    assert f"  algo: {', '.join(ALGORITHMS.names())}" in lines
    assert (
        "  algo.critic_warmup_steps=6  # Steps in which only the critic learns, before the policy's schedule begins."
        in lines
    )
    assert (
        command("--help", "algo.warm_start.epochs").out
        == "  algo.warm_start.epochs=12  # Passes over the demonstrations.\n"
    )
    assert "algo.total_env_steps=150000" in command("--help", "algo=maskable_ppo", "algo").out
    assert "Did you mean 'algo.kl_coef'?" in command("--help", "algo.kl_cof").err


def test_one_setting_counts_the_demonstrations_of_whatever_stage_uses_them():
    assert [stage.config.num_demonstrations for stage in stages("demonstrations.num=7", "algo=gkd")] == [7, 7]
    assert stages("demonstrations.num=7")[0].config.num_demonstrations == 7
    assert stages("demonstrations.num=7", "algo=ppo", "algo.warm_start=sft")[0].config.num_demonstrations == 7
    assert configure("demonstrations.num=7") == configure("algo.warm_start.num_demonstrations=7")
    with pytest.raises(ConfigurationError, match="no stage of ppo trains on demonstrations"):
        configure("demonstrations.num=7", "algo=ppo", "algo.warm_start=null")


def test_the_examples_in_the_help_compose():
    shown = [line.strip().partition("#")[0].split() for line in command("--help").out.splitlines()]
    examples = [words[3:] for words in shown if words[:3] == ["python", "-m", "algorithms.run"]]
    assert len(examples) >= 8
    for words in examples:
        if not {"-m", "--cfg"} & set(words):
            words = [word.replace("<", "").replace(">", "") for word in words]
            assert build_stages(configure(*words).algo)


def test_the_settings_can_be_seen_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = command("--cfg", "job", "algo=ppo")
    assert run.code == 0
    assert OmegaConf.create(run.out).algo.name == "ppo"
    assert list(tmp_path.iterdir()) == []


def test_an_installed_command_finds_the_configuration_from_anywhere(tmp_path):
    code = "import sys; from algorithms.run import main; sys.argv = ['agentic-rag-run', '--cfg', 'job']; main()"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout).model.policy == "tiny-student"


def test_names_of_other_packages_become_options_too():
    @dataclasses.dataclass
    class Settings:
        strength: float = 0.5

    @REWARDS.register("from_elsewhere", Settings)
    class FromElsewhere:
        def __init__(self, config):
            self.config = config

        def __call__(self, outcome):
            return self.config.strength

    try:
        register_schemas()
        reward = configure("reward=from_elsewhere", "reward.strength=0.25").reward
        assert REWARDS.build(reward)(None) == 0.25
    finally:
        del REWARDS._entries["from_elsewhere"]
        for folder in (ConfigStore.instance().repo["reward"], ConfigStore.instance().repo["schema"]["reward"]):
            del folder["from_elsewhere.yaml"]


def test_shares_of_networks_exclude_what_lies_inside_or_below_others():
    assert LearnerConfig(sharding="fsdp2").critic == "separate"
    with pytest.raises(ConfigurationError, match=r"learner\.critic=separate"):
        LearnerConfig(sharding="fsdp2", critic="shared")
    with pytest.raises(ConfigurationError, match="sharding must be one of none, fsdp2"):
        LearnerConfig(sharding="fsdp")
    with pytest.raises(ConfigurationError, match=r"leave out model\.lora\.rank"):
        RunConfig(learner=LearnerConfig(sharding="fsdp2"), model=ModelConfig(lora=LoraConfig(rank=4)))
