"""Environments of skyrl-gym through the contract; its search is a client of our server."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agentic_rag_env import LiftedVectorEnv, info_at
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.lifted import FIRST_SEEDS
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS
from agentic_rag_env.types import Ending

pytest.importorskip("skyrl_gym")

APPLES = [{"role": "system", "content": "End with #### and a number."}, {"role": "user", "content": "Ann has 3 + 4."}]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def solved(env_class: str, solution: Any, **fields: Any) -> dict[str, Any]:
    """A class, and the rows of a file with one task that has this solution."""
    spec = "reward_model" if env_class == "aime" else "reward_spec"
    return {"env_class": env_class, "rows": [{"prompt": APPLES, spec: {"ground_truth": solution}, **fields}]}


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"prompt": APPLES, "reward_spec": {"ground_truth": "7"}}]
    rows.append({"prompt": [{"role": "user", "content": "2 * 1200?"}], "reward_spec": {"ground_truth": "2400"}})
    return write(tmp_path / "sums-train.jsonl", *rows)


def test_sums_of_gsm8k(sums: Path) -> None:
    kwargs = {"env_class": "gsm8k", "tasks": str(sums).replace("train", "{split}")}
    envs = ENVS.build({"name": "gymnasium", "id": "SkyRL-v0", "kwargs": kwargs, "split_argument": "split"}, num_envs=4)
    assert envs.metadata["action_ends"] == ("\n\n\n",)
    prompts, _ = envs.reset(options={"question_index": [0, 1, 2, 0]})
    assert prompts == ("End with #### and a number.\n\nAnn has 3 + 4.", "2 * 1200?", prompts[0], prompts[0])
    _, rewards, terminations, _, infos = envs.step(["3 + 4 is #### 7", "#### 2,400", "#### 8", "seven"])
    assert rewards.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert terminations.all()
    assert [info_at(infos, row)["correct"] for row in range(4)] == [True, True, False, False]
    assert info_at(infos, 3)["ending"] is Ending.ANSWERED


def test_tasks_of_aime_have_their_solution_under_another_name(tmp_path: Path) -> None:
    task = {"prompt": APPLES, "reward_model": {"ground_truth": "7"}}
    tasks = write(tmp_path / "t.jsonl", task)
    env = gymnasium.make("SkyRL-v0", env_class="aime", tasks=tasks)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("So 3 + 4 is 7. Answer: 7")
    assert (reward, terminated, info["correct"]) == (1.0, True, True)
    with pytest.raises(DataError, match=r"line 1: .*a task of gsm8k needs 'reward_spec' with 'ground_truth'"):
        gymnasium.make("SkyRL-v0", env_class="gsm8k", tasks=tasks)


def test_a_task_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    tasks = write(tmp_path / "t.jsonl", {"prompt": APPLES, "reward_spec": {"ground_truth": "7"}})
    env = gymnasium.make("SkyRL-v0", env_class="gsm8k_multi_turn", tasks=tasks)
    with pytest.raises(DataError, match=r"Task 0 is none of gsm8k_multi_turn: extra_info field is required.*t\.jsonl"):
        env.reset(seed=0)


def test_a_task_without_its_database_is_named(tmp_path: Path) -> None:
    def env(data: str) -> Any:
        fields = solved("text2sql", "SELECT 1", db_id="bank", data=data)
        tasks = write(tmp_path / f"{data}.jsonl", *fields["rows"])
        return gymnasium.make("SkyRL-v0", env_class="text2sql", tasks=tasks, config={"db_path": str(tmp_path)})

    with pytest.raises(DataError, match=r"Task 0 is .* data must be synsql, spider or bird, got 'wiki'. Mend .*wiki\."):
        env("wiki").reset(seed=0)
    with pytest.raises(
        ConfigurationError, match=r"Task 0 of .*spider\.jsonl has no .*bank\.sqlite.*Set config\.db_path"
    ):
        env("spider").reset(seed=0)
    database = tmp_path / "spider" / "database" / "bank" / "bank.sqlite"
    database.parent.mkdir(parents=True)
    sqlite3.connect(database).close()
    assert env("spider").reset(seed=0)[0].startswith("End with ####")


def test_turns_of_gsm8k_go_on_until_the_answer_is_right(tmp_path: Path) -> None:
    task = {"prompt": APPLES, "reward_spec": {"ground_truth": "7"}, "max_turns": 4, "extra_info": {}}
    env = gymnasium.make("SkyRL-v0", env_class="gsm8k_multi_turn", tasks=write(tmp_path / "t.jsonl", task))
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step("#### 8")
    assert "tentative numeric answer" in observation
    assert reward == pytest.approx(0.2 / 4)
    assert (terminated, info["correct"]) == (False, False)
    observation, reward, terminated, truncated, info = env.step("#### 7")
    assert (observation, reward, terminated, truncated, info["correct"]) == ("", 1.0, True, False, True)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    rows = [{"prompt": [{"content": text}], "reward_spec": {"ground_truth": "7"}} for text in ("a", "b", "c")]
    tasks, seen = tmp_path / "t.jsonl", []
    for written in (rows[:1], rows[1:]):
        env = gymnasium.make("SkyRL-v0", env_class="gsm8k", tasks=write(tasks, *written))
        seen.append([env.reset(seed=seed)[0] for seed in range(2)])
    assert seen == [["a", "a"], ["b", "c"]]


def three(folder: Path, split: str) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"{split} {place}"}], "reward_spec": {"ground_truth": "7"}}
        for place in range(3)
    ]
    return write(folder / f"t-{split}.jsonl", *rows)


def lifted(tasks: Path, split: str, **settings: Any) -> Any:
    kwargs = {"env_class": "gsm8k", "tasks": str(tasks)}
    return ENVS.build({"name": "gymnasium", "id": "SkyRL-v0", "kwargs": kwargs, **settings}, num_envs=4, split=split)


def test_each_split_reads_its_own_tasks_and_measures_none_twice(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        three(tmp_path, split)
    tasks = tmp_path / "t-{split}.jsonl"
    for split in ("dev", "test"):
        envs = lifted(tasks, split, split_argument="split")
        assert len(envs.dataset) == 3
        prompts, _ = envs.reset(options={"question_index": [0, 1, 2, 0]})
        assert prompts == (f"{split} 0", f"{split} 1", f"{split} 2", f"{split} 0")
        with pytest.raises(ConfigurationError, match=r"another split than 'train'.*env\.split_argument=split"):
            lifted(tasks, split).reset(options={"question_index": [0, 1, 2, 0]})
    assert len(lifted(tasks, "test", split_argument="split", num_test=2).dataset) == 2
    training = lifted(tasks, "train", split_argument="split", num_train=5)
    prompts, _ = training.reset(options={"question_index": [2, 3, 4, 0]})
    assert prompts == ("train 2", "train 0", "train 1", "train 0")
    env = gymnasium.make("SkyRL-v0", env_class="gsm8k", tasks=tasks, split="test")
    assert env.reset(seed=FIRST_SEEDS["test"] + 2)[0] == "test 2"
    with pytest.raises(ConfigurationError, match=r"Task 3 was asked for, but .* has 3 tasks; set env\.num_test=3"):
        env.reset(seed=FIRST_SEEDS["test"] + 3)


def test_one_file_for_all_splits_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the same file for every split, so test measures tasks that a run"):
        lifted(three(tmp_path, "train"), "test", split_argument="split")


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[list[str], int]]]]:
    """The address of our server over the tiny world, and what it was asked."""
    pytest.importorskip("starlette")
    from agentic_rag_env.retrievers.serving.cli import listen_at, make_server
    from agentic_rag_env.retrievers.serving.service import ServerConfig

    dataset = DATASETS.build({"name": "tiny", "split": "test", "num_passages": 150, "num_questions": 60})
    found, asked = RETRIEVERS.build("bm25", corpus=dataset.corpus), []

    class Noting:
        def search(self, queries: list[str], top_k: int) -> Any:
            asked.append((list(queries), top_k))
            return found.search(queries, top_k)

    config = ServerConfig(port=0)
    listener = listen_at(config)
    server = make_server(Noting(), config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve", asked
    server.should_exit = True
    thread.join(20)


def test_its_search_is_a_client_of_our_server(server: tuple[str, list[Any]], tmp_path: Path) -> None:
    url, asked = server
    dataset = DATASETS.build({"name": "tiny", "split": "test", "num_passages": 150, "num_questions": 60})
    question = dataset[0]
    spec = {"ground_truth": {"target": list(question.golden_answers)}}
    task = {"prompt": [{"role": "user", "content": question.text}], "reward_spec": spec, "max_turns": 3}
    kwargs = {"env_class": "search", "tasks": str(write(tmp_path / "t.jsonl", task))}
    envs = LiftedVectorEnv("SkyRL-v0", 2, range(5), {**kwargs, "config": {"search_url": url, "topk": 2}})
    assert envs.metadata["action_ends"] == ("</search>", "</answer>")
    prompts, _ = envs.reset()
    assert prompts == (question.text,) * 2
    expected = RETRIEVERS.build("bm25", corpus=dataset.corpus).search([question.text], 2)[0]
    observations, rewards, *_ = envs.step([f"<search>{question.text}</search>", None])
    assert asked == [([question.text], 2)]
    result = json.loads(observations[0].strip().removeprefix("<information>").removesuffix("</information>"))["result"]
    assert result == "".join(f"Doc {rank}: {one.contents.strip()}\n" for rank, one in enumerate(expected, 1))
    assert rewards.tolist() == [0.0, 0.0]
    answers = [f"<answer>{question.golden_answers[0]}</answer>", "<answer>nobody at all</answer>"]
    _, rewards, terminations, _, infos = envs.step(answers)
    assert (rewards.tolist(), terminations.tolist()) == ([1.0, 0.0], [True, True])
    assert [info_at(infos, row)["correct"] for row in range(2)] == [True, False]
    envs.close()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((None, "refused"), "Search error: refused"),
        ((None, None), "Unknown API state (no response and no error message)."),
        (({"result": [[{"text": "no document"}]]}, None), "Error processing search results: 'document'"),
        (RuntimeError("no route"), "Search error: API Request Exception during batch search: no route"),
        (({"result": [[{"document": {"contents": "Rome\nA city."}}]]}, None), None),
        (({"result": []}, None), None),
    ],
)
def test_a_search_that_fails_is_no_passage(
    reply: Any, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(**_: Any) -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr("skyrl_gym.tools.search.call_search_api", call)
    task = {"prompt": APPLES, "reward_spec": {"ground_truth": {"target": ["Rome"]}}, "max_turns": 3}
    kwargs = {"env_class": "search", "tasks": str(write(tmp_path / "t.jsonl", task))}
    envs = LiftedVectorEnv("SkyRL-v0", 2, range(5), kwargs)
    envs.reset()
    observations, rewards, terminations, truncations, infos = envs.step(["<search>Italy</search>", "no query"])
    assert (info_at(infos, 0)["error"], rewards[0], terminations[0]) == (error, 0.0, False)
    assert info_at(infos, 1)["error"] is None, "nothing was searched for"
    assert truncations.tolist() == [error is not None, False]
    assert info_at(infos, 0)["ending"] is (None if error is None else Ending.SEARCH_FAILED)
    assert bool(observations[0]) == (error is None)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"env_class": "lcb"}, ConfigurationError, "env_class must be one of aime, gsm8k, gsm8k_multi_turn, search"),
        ({"env_class": "serch"}, ConfigurationError, "Did you mean 'search'"),
        ({"tasks": "nowhere-{split}.jsonl"}, ConfigurationError, "tasks=nowhere-{split}.jsonl of split 'train' is no"),
        ({"split": "tets"}, ConfigurationError, "split must be one of .* Did you mean 'test'"),
        ({"env_class": "search", "config": {"top_k": 5}}, ConfigurationError, "has no 'top_k'. Did you mean 'topk'"),
        ({"config": {"topk": 5}}, ConfigurationError, "config of gsm8k has no 'topk'. Known: none"),
        ({"rows": []}, ConfigurationError, "has no tasks"),
        ({"rows": [{"prompt": "Ann?"}]}, DataError, "line 1: no such row .*'prompt', a list of messages"),
        ({"rows": [{"prompt": [{"content": None}]}]}, DataError, "line 1: .* messages with a text as 'content'"),
        ({"rows": [{"prompt": [{"content": [{"text": "Ann?"}]}]}]}, DataError, "messages with a text as 'content'"),
        (
            solved("search", {"target": "Rome"}, max_turns=None),
            DataError,
            "line 1: .*max_turns must be an integer of at least 1, got None",
        ),
        ({"rows": [{"prompt": APPLES}]}, DataError, "a task of gsm8k needs 'reward_spec' with 'ground_truth'"),
        (
            {"env_class": "aime", "rows": [{"prompt": APPLES, "reward_model": None}]},
            DataError,
            "a task of aime needs 'reward_model' with 'ground_truth'",
        ),
        (solved("gsm8k", 7), DataError, r"line 1: .*ground_truth of gsm8k must be a number as a text .*, got 7\."),
        (solved("gsm8k", "1,200"), DataError, "a text without commas, such as '1200', got '1,200'"),
        (solved("gsm8k_multi_turn", "3+4=7 #### 7"), DataError, "ground_truth of gsm8k_multi_turn must be a number"),
        (solved("aime", 7), DataError, r"ground_truth of aime must be a text, got 7\."),
        (solved("text2sql", ["SELECT 1"]), DataError, "ground_truth of text2sql must be a text, got"),
        (
            solved("search", {"target": None}),
            DataError,
            r"search must be {'target': ...} with a text or a list of texts",
        ),
        (solved("search", {"target": []}), DataError, "ground_truth of search must be"),
        (solved("search", ["Rome"]), DataError, r"ground_truth of search must be .*, got \['Rome'\]"),
    ],
)
def test_what_cant_work_is_refused(kwargs: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    tasks = write(tmp_path / "t.jsonl", *kwargs.pop("rows", [{"prompt": APPLES, "reward_spec": {"ground_truth": "7"}}]))
    with pytest.raises(error, match=message):
        LiftedVectorEnv("SkyRL-v0", 1, range(1), {"env_class": "gsm8k", "tasks": str(tasks)} | kwargs)


def test_the_extra_is_named_where_it_is_missing(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skyrl_gym", None)
    with pytest.raises(
        ConfigurationError, match=r"needs the library skyrl-gym: pip install 'agentic-rag-env\[skyrl\]'"
    ):
        LiftedVectorEnv("SkyRL-v0", 1, range(1), {"env_class": "gsm8k", "tasks": str(sums)})
