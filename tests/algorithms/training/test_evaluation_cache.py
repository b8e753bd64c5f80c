"""Evaluations kept between runs: taken where everything is the same, made anew where anything differs."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.envs.registration import registry as registered
from small_runs import DGPO, PPO, assert_same_run, command, resume, train

from agentic_rag_env import FreeText
from agentic_rag_env.lifted import LiftedVectorEnv
from agentic_rag_env.registry import PLUGINS_VARIABLE, REWARDS
from algorithms.learner.networks import load_tokenizer
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout.player import Player
from algorithms.training import fingerprints
from algorithms.training.build import Environments, Networks
from algorithms.training.evaluation_cache import Kept, place
from algorithms.training.fingerprints import of_code, of_plugins
from algorithms.training.model_names import resolve_model
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

STUDENT = resolve_model("tiny-student")


def test_a_model_that_runs_measure_alike_is_measured_once(dgpo_run, cache, tmp_path):
    forbidden = AssertionError("the teacher is loaded to be measured again")
    with patch.object(Networks, "teacher", side_effect=forbidden):
        ppo = train(tmp_path / "ppo", cache, "algo=ppo", *PPO)
    assert ppo.summary["evaluated_before"] == ["raw", "teacher"]
    assert "teacher: measured before, kept in " in ppo.out
    other = train(tmp_path / "other", cache, *DGPO, "algo.kl_coef=0.5")
    assert other.summary["evaluated_before"] == ["raw", "kd", "teacher"]
    for run, names in ((ppo, ("raw", "teacher")), (other, ("raw", "kd", "teacher"))):
        for name in names:
            for part in ("evaluation", "arc"):
                assert run.summary[part][name] == dgpo_run.summary[part][name]
            for mode in ("greedy", "T=1"):
                file = f"test-{name}-{mode}.jsonl"
                assert run.transcripts()[f"{file}.gz"] == dgpo_run.transcripts()[f"{file}.gz"]
                theirs, ours = (each.path / "predictions" / file for each in (run, dgpo_run))
                assert theirs.read_bytes() == ours.read_bytes()


def test_what_a_run_measures_without_a_cache_is_the_same(dgpo_run, cache, tmp_path):
    with patch("algorithms.training.summary.place", return_value=None):
        alone = train(tmp_path / "alone", cache, *DGPO)
    assert alone.summary["evaluated_before"] == []
    assert alone.summary["evaluation"] == dgpo_run.summary["evaluation"]
    assert alone.summary["arc"] == dgpo_run.summary["arc"]


def test_a_run_killed_in_its_evaluation_goes_on_with_it(dgpo_run, tmp_path):
    path = Path(shutil.copytree(dgpo_run.path, tmp_path / "run"))
    (path / "summary.json").unlink()
    with patch("algorithms.training.summary.publish", side_effect=KeyboardInterrupt):
        assert command(f"resume={path}").code == 130
    assert (path / "evaluations").is_dir()
    with patch.object(Player, "rollout", side_effect=AssertionError("played again")):
        assert_same_run(dgpo_run, resume(path))
    assert not (path / "evaluations").exists()


@pytest.fixture(scope="module")
def conditions():
    """Where an evaluation is kept, with something changed: settings of an evaluation, or arguments of `place`."""

    def placed(model=STUDENT, is_teacher=False, **changed):
        world = {"split": "test", "num_passages": 100, "num_questions": 10}
        given = vars(EvaluateConfig()) | {"num_envs": 4, "dataset": world, "evaluation": {}} | changed
        config = evaluate_config(given, STUDENT, {})
        networks = Networks(config)
        envs = Environments(config, networks.tokenizer).envs("test")
        return place(Path("root"), config, networks, envs, model, is_teacher)

    return placed


def test_the_same_conditions_have_the_same_place(conditions, tmp_path):
    path = conditions()
    assert path == conditions()
    elsewhere = shutil.copytree(STUDENT, tmp_path / "elsewhere")
    assert conditions(str(elsewhere)) == path
    (elsewhere / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert conditions(str(elsewhere)) != path


@pytest.mark.parametrize(
    "changed",
    [
        {"model": resolve_model("tiny-teacher")},
        {"is_teacher": True},
        {"env": {"max_turns": 2}},
        {"dataset": {"split": "test", "num_passages": 100, "num_questions": 10, "seed": 7}},
        {"retriever": {"k1": 1.3}},
        {"reward": {"name": "f1"}},
        {"rollout": {"max_new_tokens": 9}},
        {"num_envs": 5},
        {"evaluation": {"temperatures": [0.0]}},
        {"evaluation": {"seed": 1}},
        {"evaluation": {"num_questions": 5}},
        {"probes": []},
    ],
    ids=str,
)
def test_each_condition_counts(conditions, changed):
    assert conditions(**changed) not in (None, conditions())


def test_code_counts(conditions, tmp_path, monkeypatch):
    before = conditions()
    (tmp_path / "rollout.py").write_text("changed = True\n")
    monkeypatch.setattr(fingerprints, "_CODE", (*fingerprints._CODE, tmp_path))
    assert conditions() not in (None, before)


@pytest.fixture
def plugged_in(monkeypatch):
    """Registers a reward that says it comes from a module."""
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))

    def plug_in(module: ModuleType):
        def reward(episode):
            return 0.0

        reward.__module__ = module.__name__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        REWARDS.register("plugged_in")(reward)

    return plug_in


def test_code_of_plug_ins_counts_with_the_rest_of_their_package(plugged_in, monkeypatch, tmp_path):
    before = of_code()
    modules = [ModuleType("some_package.rewards"), ModuleType("some_package.helpers")]
    for module in modules:
        module.__file__ = str(tmp_path / f"{module.__name__.replace('.', '/')}.py")
        Path(module.__file__).parent.mkdir(exist_ok=True)
        Path(module.__file__).write_text("first")
    plugged_in(modules[0])
    seen = [before, of_code()]
    monkeypatch.setitem(sys.modules, modules[1].__name__, modules[1])
    assert of_code() == seen[1], "a module counts before its first import, too"
    for module in modules:
        Path(module.__file__).write_text("second")
        seen.append(of_code())
    assert len(set(seen)) == 4


def test_code_of_a_file_that_registers_with_gymnasium_alone_counts(monkeypatch, tmp_path):
    """Its environment plays the episodes, though no registry of ours knows it."""
    file, seen = tmp_path / "sums.py", [(of_code(), of_plugins())]
    module = ModuleType(str(file))
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv(PLUGINS_VARIABLE, str(file))
    for content in ("first", "second"):
        file.write_text(content)
        seen.append((of_code(), of_plugins()))
    assert [len(set(found)) for found in zip(*seen, strict=True)] == [3, 3]
    monkeypatch.delenv(PLUGINS_VARIABLE)
    assert (of_code(), of_plugins()) == seen[0], "a file that nobody names any more is still loaded"


def test_a_file_that_was_named_from_another_folder_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(REWARDS, "_plugins_loaded", None)
    (tmp_path / "sums.py").write_text("loaded = True")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PLUGINS_VARIABLE, "sums.py")
    found = [of_plugins()]
    monkeypatch.chdir("/")
    found.append(of_plugins())
    (tmp_path / "sums.py").write_text("changed = True")
    assert found[0] == found[1] != of_plugins()


def test_code_of_an_environment_that_gymnasium_alone_knows_counts(monkeypatch, tmp_path):
    """A script imports it, or a notebook defines it."""

    class Sums(gymnasium.Env):
        metadata = {"action_ends": ["."]}  # noqa: RUF012
        observation_space = action_space = FreeText()

    module = ModuleType("sums_of_a_script")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Sums.__module__ = module.__name__
    monkeypatch.setitem(registered, "Sums-v0", EnvSpec("Sums-v0", entry_point=Sums, max_episode_steps=2))
    envs = LiftedVectorEnv("Sums-v0", 2, range(3))
    assert of_plugins(*envs.layers) is None, "its code is in no file"
    module.__file__, found = str(tmp_path / "sums.py"), []
    for content in ("first", "second", "first"):
        Path(module.__file__).write_text(content)
        found.append(of_plugins(*envs.layers))
    assert found[0] == found[2] != found[1]


def test_where_something_is_not_known_nothing_is_kept(conditions, plugged_in):
    with patch("algorithms.training.evaluation_cache.of_retriever", return_value=None):
        assert conditions() is None
    plugged_in(ModuleType("typed_into_a_console"))
    assert of_code() is None
    assert conditions() is None


def played(number: int, error: str | None = None) -> Trajectory:
    info = {"question_id": str(number), "passages": (), "error": error}
    ids = np.array([number, 5], dtype=np.int64)
    turn = Turn(ids, np.array([-0.1, -1 / 3], dtype=np.float32), ids[:0], info)
    return Trajectory(ids, [turn], number, "policy", 1.0, True, True, False)


def unasked():
    raise AssertionError("played again")


def test_episodes_and_figures_are_kept_mode_by_mode(tmp_path):
    tokenizer = load_tokenizer(STUDENT)
    figures = {"thinking": {"gain": {"value": 0.1, "n": 3, "interval": [0.0, 0.2]}}}
    first = Kept(tmp_path / "key", tokenizer)
    first.episodes("greedy", lambda: [played(0), played(1)])
    assert not first.found_all
    interrupted = Kept(tmp_path / "key", tokenizer)  # the run was killed after the first mode
    assert [each.prompt_ids[0] for each in interrupted.episodes("greedy", unasked)] == [0, 1]
    assert interrupted.found_all
    interrupted.episodes("T=1", lambda: [played(2)])
    interrupted.arc(lambda: (figures, True))
    assert not interrupted.found_all

    again = Kept(tmp_path / "key", tokenizer)
    (kept,) = again.episodes("T=1", unasked)
    assert kept.turns[0].action_logprobs.tobytes() == played(2).turns[0].action_logprobs.tobytes()
    assert kept.prompt_ids.tolist() == [2, 5]
    assert again.arc(unasked) == figures
    assert again.found_all


def test_a_failed_search_may_succeed_another_time(tmp_path):
    kept = Kept(tmp_path / "key", load_tokenizer(STUDENT))
    kept.episodes("greedy", lambda: [played(0), played(1, "timeout")])
    kept.episodes("T=1", lambda: [played(0)])
    kept.arc(lambda: ({}, True))
    assert not (tmp_path / "key").exists()
    kept = Kept(tmp_path / "key", load_tokenizer(STUDENT))
    kept.episodes("greedy", lambda: [played(0)])
    assert kept.arc(lambda: ({"probe": {}}, False)) == {"probe": {}}
    assert not (tmp_path / "key" / "arc.json").exists(), "a search of the probes has failed"


def test_nothing_is_kept_without_a_place():
    kept = Kept(None, None)
    assert kept.episodes("greedy", lambda: [played(0)])[0].correct
    assert kept.arc(lambda: ({}, True)) == {}
    assert not kept.found_all


@pytest.mark.parametrize("damage", [b"", b"{", None], ids=["empty", "other", "shortened"])
@pytest.mark.parametrize("file", ["arc.json", "greedy.jsonl.gz"])
def test_a_damaged_file_is_made_again_with_a_word(tmp_path, file, damage):
    def fetch(kept: Kept, count: int):
        if file == "arc.json":
            return kept.arc(lambda: ({"probe": {"figure": {"value": count}}}, True))
        return len(kept.episodes("greedy", lambda: [played(number) for number in range(count)]))

    tokenizer = load_tokenizer(STUDENT)
    first = fetch(Kept(tmp_path, tokenizer), 4)
    # Half of the rows, in a file that is whole in itself.
    half = (
        gzip.compress(b"".join(gzip.decompress((tmp_path / file).read_bytes()).splitlines(True)[:2]))
        if (file.endswith(".gz"))
        else b"{}"
    )
    (tmp_path / file).write_bytes(half if damage is None else damage)
    kept = Kept(tmp_path, tokenizer)
    with pytest.warns(UserWarning, match=rf"{file} is made again: it does not have the checksum"):
        assert fetch(kept, 4) == first
    assert not kept.found_all
    assert fetch(Kept(tmp_path, tokenizer), 5) == first, "kept again"
