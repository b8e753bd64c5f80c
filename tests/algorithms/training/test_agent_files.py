"""`agent.json`: what it holds, what is taken from it, and what counts where several say something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import DGPO_STEPS, KD_STEPS

from agentic_rag_env.errors import ConfigurationError, DataError
from algorithms.training.agent_files import AGENT_FILE, read_agent
from algorithms.training.compose import composed, configure
from algorithms.training.protocol import with_protocol
from algorithms.training.schemas import register_schemas

register_schemas()
SOUND: dict[str, Any] = {
    "format": 1,
    "env": {
        "name": "agentic_rag", "prompt": "Search: {question}\n", "max_turns": 2, "top_k": 1, "final_turn": "no_search",
        "max_observation_chars": None, "max_observation_tokens": 100,
    },
    "action_ends": ["</search>", "</answer>"],
    "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 20, "max_tokens": 300},
    "precision": "bfloat16",
    "vocab_size": 1000,
    "measured": {
        "dataset": {"name": "tiny", "split": "train", "num_passages": 150},
        "retriever": {"name": "bm25", "stemmer": "english", "k1": 0.5}, "reward": {"name": "exact_match"},
        "evaluation": {"num_questions": 7, "temperatures": [0.0], "corpus": "own", "seed": 3}, "num_envs": 5,
    },
}  # fmt: skip


def folder(path: Path, **changed: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / AGENT_FILE).write_text(json.dumps({**SOUND, **changed}))
    return path


def of_run(*overrides: str) -> Any:
    return with_protocol(composed("config", overrides), overrides)


def test_a_checkpoint_says_how_its_agent_was_asked_and_measured(dgpo_run):
    for step in (KD_STEPS, KD_STEPS + DGPO_STEPS):
        file = dgpo_run.path / "checkpoints" / f"{step:06d}" / AGENT_FILE
        assert json.loads(file.read_text()) == {
            "format": 1,
            "env": {
                "name": "agentic_rag", "prompt": "bare", "max_turns": 2, "top_k": 3, "final_turn": "no_search",
                "max_observation_chars": None, "max_observation_tokens": 500,
            },
            "action_ends": ["</search>", "</answer>"],
            "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "max_tokens": 512},
            "precision": "float32",
            "vocab_size": 749,
            "measured": {
                **{part: dgpo_run.summary["config"][part] for part in ("dataset", "retriever", "reward")},
                "evaluation": {"num_questions": 32, "temperatures": [0.0, 1.0], "corpus": "own", "seed": 0},
                "num_envs": 16,
            },
        }  # fmt: skip


def test_what_is_written_is_read(dgpo_run):
    agent = read_agent(dgpo_run.path / "checkpoints" / f"{KD_STEPS:06d}")
    assert agent is not None
    assert agent.withheld == {}
    config = dgpo_run.summary["config"]
    assert agent.protocol == {"env": config["env"], "rollout": {"max_new_tokens": 24, "max_tokens": 512}}
    for part in ("env", "dataset", "retriever", "reward", "num_envs"):
        assert agent.settings[part] == config[part], part
    how_it_is_computed = {"cuda_graphs": "off", "decode_during_search": 0}
    assert agent.settings["rollout"] | how_it_is_computed == config["rollout"]
    assert not how_it_is_computed.keys() & agent.settings["rollout"].keys()
    assert agent.settings["learner"] == {"precision": "float32"}


def test_a_folder_without_the_file_and_a_hub_id_bring_none(tmp_path):
    assert read_agent(tmp_path) is None
    assert read_agent("somebody/a-model") is None


# --- a stranger's file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 2}, "its format must be 1"),
        ({"run": "me"}, "there is no entry run"),
        ({"env": {"prompt": "bare"}}, "env must be settings with a name"),
        ({"env": {"name": "agentic_rag", "prompt": "${oc.env:HOME} {question}"}}, "holds an interpolation"),
        ({"precision": "auto"}, "precision must be one of float32, bfloat16, float64, got 'auto'"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"action_ends": []}, "action_ends must be a list of texts"),
        ({"action_ends": "</answer>"}, "action_ends must be a list of texts"),
        ({"rollout": {"max_new_tokens": 10**9}}, "max_new_tokens must be a whole number in [1, 65536]"),
        ({"rollout": {"max_new_tokens": "many"}}, "max_new_tokens must be a whole number, got 'many'"),
        ({"rollout": {"temperature": float("nan")}}, "NaN is no number of a setting"),
        ({"rollout": {"beams": 3}}, "There is no setting beams."),
        ({"measured": {"num_envs": 10**6}}, "num_envs must be a whole number in [1, 4096]"),
        ({"measured": {"evaluation": {"num_questions": -1}}}, "num_questions must be an integer of at least 1"),
        ({"measured": []}, "says nothing of an agent"),
        ({"env": {"name": "agentic_rag", "prompt": "x" * 2**20}}, "more than 1048576 bytes"),
    ],
)
def test_what_no_agent_can_have_is_refused_by_name(changed, said, tmp_path):
    with pytest.raises(DataError) as error:
        read_agent(folder(tmp_path / "m", **changed))
    assert said in str(error.value)
    assert str(tmp_path / "m" / AGENT_FILE) in str(error.value)


def test_texts_that_could_be_paths_addresses_or_modules_are_withheld(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "english").touch()
    agent = read_agent(
        folder(
            tmp_path / "m",
            env={"name": "gymnasium", "id": "evil_module:My-v0", "kwargs": {"where": ["/etc/passwd"]}, "num_test": 5},
            measured={
                "dataset": {"name": "jsonl", "questions": "q.jsonl", "corpus": None, "split": "all"},
                "retriever": {"name": "bm25", "stemmer": "english", "k1": 0.5, "tokenizer": "words"},
            },
        )
    )
    assert agent is not None
    assert agent.env == {"name": "gymnasium", "num_test": 5}
    assert agent.measured["dataset"] == {"name": "jsonl", "corpus": None, "split": "all"}
    assert agent.measured["retriever"] == {"name": "bm25", "k1": 0.5, "tokenizer": "words"}, "a file has this name"
    assert agent.withheld == {
        "env.id": "evil_module:My-v0",
        "env.kwargs": {"where": ["/etc/passwd"]},
        "dataset.questions": "q.jsonl",
        "retriever.stemmer": "english",
    }
    with pytest.raises(ConfigurationError, match=r"""add: 'dataset\.questions="q\.jsonl"' .*env\.kwargs="""):
        agent.require_said(lambda key: key == "env.id", "m")


def test_a_plain_word_is_taken_where_no_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent = read_agent(folder(tmp_path / "m"))
    assert agent is not None
    assert agent.measured["retriever"] == SOUND["measured"]["retriever"]
    assert agent.withheld == {}


# --- a new run -------------------------------------------------------------------------------------------------------


def test_a_run_takes_over_the_protocol_of_its_policy_and_says_so(tmp_path, capsys):
    config = of_run("algo=ppo", f"model.policy={folder(tmp_path / 'm')}")
    assert config.env == SOUND["env"]
    assert (config.rollout.max_new_tokens, config.rollout.max_tokens) == (20, 300)
    assert config.rollout.temperature == 1.0, "how a run samples is its own affair"
    assert (config.rollout.top_p, config.num_envs, config.dataset.num_passages) == (1.0, 96, 1000)
    assert config.learner.precision == "auto", "the machine of the run decides"
    out = capsys.readouterr().out
    assert out.count("\n") == 2  # one for the prompt's own line break
    assert "was trained with env.prompt=Search: {question}" in out
    assert "rollout.max_new_tokens=20" in out
    assert "which counts here too (not env.prompt=bare" in out


def test_a_run_from_python_takes_it_over_too(tmp_path, capsys):
    config = configure(algo="ppo", model={"policy": str(folder(tmp_path / "m"))}, env={"max_turns": 3})
    assert config.env == SOUND["env"] | {"max_turns": 3}
    assert (config.rollout.max_new_tokens, config.rollout.max_tokens) == (20, 300)
    assert "was trained with env.prompt=Search: {question}" in capsys.readouterr().out
    own = configure(algo="ppo", model={"policy": str(tmp_path / "m")}, env="agentic_rag")
    assert own.env["prompt"] == "bare", "an environment chosen by name is the user's own as a whole"


def test_the_command_line_counts_before_it_and_a_line_says_so(tmp_path, capsys):
    policy = folder(tmp_path / "m")
    config = of_run("algo=ppo", f"model.policy={policy}", "env.max_turns=3", "++rollout.max_tokens=200")
    assert config.env == SOUND["env"] | {"max_turns": 3}
    assert (config.rollout.max_new_tokens, config.rollout.max_tokens) == (20, 200)
    line = (
        f"The command line says env.max_turns=3, rollout.max_tokens=200, and that counts; model.policy={policy} was "
        "trained with env.max_turns=2, rollout.max_tokens=300.\n"
    )
    assert capsys.readouterr().out.endswith(line)


def test_an_environment_chosen_by_name_is_the_users_own(tmp_path, capsys):
    config = of_run("algo=ppo", f"model.policy={folder(tmp_path / 'm')}", "env=agentic_rag")
    assert (config.env.prompt, config.env.max_turns) == ("bare", 4)
    assert config.rollout.max_new_tokens == 20
    assert "The command line says env.prompt=bare, env.max_turns=4" in capsys.readouterr().out


def test_the_agent_counts_before_the_preset_of_its_model(tmp_path):
    policy = folder(tmp_path / "m")
    config = of_run("algo=sft", "model=smollm2_135m", f"model.policy={policy}")
    assert config.env == SOUND["env"]
    assert config.rollout.max_new_tokens == 20
    assert config.num_envs == 48, "the rest of the preset"


def test_a_raw_policy_learns_the_protocol_of_its_teacher(tmp_path):
    config = of_run("algo=kd", f"model.teacher={folder(tmp_path / 'm')}")
    assert config.env == SOUND["env"]


def test_policy_and_teacher_that_disagree_are_refused_until_the_command_line_decides(tmp_path, capsys):
    policy = f"model.policy={folder(tmp_path / 'p')}"
    teacher = f"model.teacher={folder(tmp_path / 't', env=SOUND['env'] | {'max_turns': 3, 'top_k': 2})}"
    with pytest.raises(ConfigurationError) as error:
        of_run("algo=kd", policy, teacher, "env.top_k=4")
    assert str(error.value) == (
        "The policy was trained with env.max_turns=2, and the teacher with env.max_turns=3. Both read the same "
        "episodes, so say which counts; for the policy's: env.max_turns=2"
    )
    capsys.readouterr()
    config = of_run("algo=kd", policy, teacher, "env.top_k=4", "env.max_turns=3")
    assert config.env == SOUND["env"] | {"max_turns": 3, "top_k": 4}
    out = capsys.readouterr().out
    assert f"{policy} was trained with env.max_turns=2, env.top_k=1." in out
    assert f"{teacher} was trained with env.top_k=2." in out


def test_another_environment_comes_whole_and_what_it_may_not_bring_is_asked_for(tmp_path):
    policy = f"model.policy={folder(tmp_path / 'm', env={'name': 'gymnasium', 'id': 'a.b:My-v0', 'num_test': 9})}"
    with pytest.raises(ConfigurationError, match=r"""count only on the command line.*add: 'env\.id="a\.b:My-v0"'"""):
        of_run("algo=ppo", policy)
    config = of_run("algo=ppo", policy, "+env.id=a.b:My-v0")
    assert (config.env.name, config.env.id, config.env.num_test) == ("gymnasium", "a.b:My-v0", 9)


def test_a_setting_of_another_type_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="max_turns"):
        of_run("algo=ppo", f"model.policy={folder(tmp_path / 'm', env=SOUND['env'] | {'max_turns': 'two'})}")


def test_a_resumed_run_keeps_its_own_settings(tmp_path):
    folder(tmp_path / "m")
    config = composed("config", ["algo=ppo", f"model.policy={tmp_path / 'm'}", "resume=somewhere"])
    assert with_protocol(config, []) is config
