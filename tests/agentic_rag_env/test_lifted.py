"""A plain environment of strings, registered with `gymnasium.register` alone, as the vector environment of the zoo."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import registry as registered
from gymnasium.vector import AutoresetMode

from agentic_rag_env import (
    AgenticRAGVectorEnv,
    ConfigurationError,
    FreeText,
    LiftedVectorEnv,
    Passage,
    ResetNeededError,
    UnknownNameError,
    info_at,
)
from agentic_rag_env.registry import ENVS
from agentic_rag_env.types import Ending, StepInfo
from agentic_rag_env.vector import BringsQuestions


class Calculator(gymnasium.Env[str, str]):
    """A product is asked for, and a calculator multiplies two digits at a time."""

    metadata = {"render_modes": [], "action_ends": ["</calc>", "</answer>"]}  # noqa: RUF012
    observation_space = action_space = FreeText()  # type: ignore[assignment]

    def __init__(self, max_turns: int = 3) -> None:
        self.max_turns = max_turns

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.numbers, self.turn = self.np_random.integers(2, 10, size=3).tolist(), 0
        return f"{' * '.join(map(str, self.numbers))} = ?\n", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        if answer := re.search(r"<answer>(.*?)</answer>", action):
            correct = answer[1].strip() == str(np.prod(self.numbers))
            return "", float(correct), True, False, self.ended(correct) | {"answer": answer[1].strip()}
        asked = re.search(r"<calc>\s*(\d+)\s*\*\s*(\d+)\s*</calc>", action)
        observation = f"\n<result>{int(asked[1]) * int(asked[2])}</result>\n" if asked else "\nAsk or answer.\n"
        over = self.turn == self.max_turns
        return observation, 0.0, False, over, self.ended(False) if over else {"action": "calc"}

    def ended(self, correct: bool) -> dict[str, Any]:
        return {"correct": correct}


class Scored(Calculator):
    """Says the score that the action spells."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {"correct": False, "f1": eval(action)}


class Silent(Calculator):
    """Says neither where actions end nor what is correct, by choice."""

    def __init__(self, says: dict[str, Any] | None = None, **metadata: Any) -> None:
        super().__init__()
        self.metadata, self.says = metadata, says or {}

    def ended(self, correct: bool) -> dict[str, Any]:
        return self.says


class Numbers(Calculator):
    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(3), {}


class Blank(Calculator):
    def reset(self, **kwargs: Any) -> Any:
        return "1 * 1 = ?", None


class Raising(Calculator):
    def step(self, action: str) -> Any:
        if action in (rewards := {"nan": float("nan"), "none": None, "text": "1", "list": [1.0]}):
            return "", rewards[action], False, False, {}
        if action == "no info":
            return "", 0.0, True, False, None
        if action == "array":
            return np.zeros(2), 0.0, False, False, {}
        raise ZeroDivisionError("oops")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    known = dict(registered)
    for name in (Calculator, Scored, Silent, Numbers, Blank, Raising, Says):
        gymnasium.register(f"{name.__name__}-v0", entry_point=name)
    yield
    registered.clear()
    registered.update(known)


def lift(env_id: str = "Calculator-v0", num_envs: int = 3, **kwargs: Any) -> LiftedVectorEnv:
    return LiftedVectorEnv(env_id, num_envs, range(100, 150), kwargs)


def test_episodes_by_hand() -> None:
    envs = lift()
    assert envs.metadata["action_ends"] == ("</calc>", "</answer>")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    prompts, infos = envs.reset(options={"question_index": np.array([0, 7, 0])})
    a, b, c = np.random.default_rng(100).integers(2, 10, size=3).tolist()
    assert prompts[0] == prompts[2] == f"{a} * {b} * {c} = ?\n" != prompts[1]
    assert info_at(infos, 1) == {
        "question_id": "Calculator-v0/107", "turn": 0, "action": None, "query": None, "passages": (), "answer": None,
        "exact_match": 0.0, "f1": 0.0, "num_searches": 0, "correct": False, "error": None, "ending": None,
    }  # fmt: skip

    observations, rewards, terminations, truncations, infos = envs.step((f"<calc>{a}*{b}</calc>", None, "hm"))
    assert observations == (f"\n<result>{a * b}</result>\n", "", "\nAsk or answer.\n")
    assert (rewards.tolist(), terminations.tolist(), truncations.tolist()) == ([0.0] * 3, [False] * 3, [False] * 3)
    assert infos["_turn"].tolist() == [True, False, True]
    assert (info_at(infos, 0)["action"], info_at(infos, 0)["ending"], info_at(infos, 0)["turn"]) == ("calc", None, 1)
    with pytest.raises(ValueError, match="left alone"):
        info_at(infos, 1)

    _, rewards, terminations, _, infos = envs.step((f"<answer> {a * b * c} </answer>", None, "<answer>1</answer>"))
    assert (rewards.tolist(), terminations.tolist()) == ([1.0, 0.0, 0.0], [True, False, True])
    right, wrong = info_at(infos, 0), info_at(infos, 2)
    assert [right[key] for key in ("correct", "exact_match", "f1", "answer", "turn")] == [  # type: ignore[literal-required]
        True, 1.0, 1.0, str(a * b * c), 2
    ]  # fmt: skip
    assert [wrong[key] for key in ("correct", "exact_match", "f1", "answer")] == [False, 0.0, 0.0, "1"]  # type: ignore[literal-required]
    assert right["ending"] is wrong["ending"] is Ending.ANSWERED
    with pytest.raises(ResetNeededError, match="Row 0 has no running episode"):
        envs.step(("again", None, None))

    prompts, infos = envs.reset(options={"reset_mask": np.array([False, False, True]), "question_index": 0})
    assert prompts[2] == f"{a} * {b} * {c} = ?\n"
    for _ in range(3):
        _, _, terminations, truncations, infos = envs.step((None, None, "hm"))
    assert (terminations[2], truncations[2]) == (False, True)
    assert (info_at(infos, 2)["ending"], info_at(infos, 2)["correct"]) == (Ending.OUT_OF_TURNS, False)
    envs.close()


def test_an_episode_is_cut_off() -> None:
    envs = lift(num_envs=2)
    envs.reset()
    with pytest.raises(ResetNeededError, match="between two turns"):
        envs.cut_off(0)
    infos = envs.step(("hm", "hm"))[4]
    cut = envs.cut_off(0)
    assert cut[:4] == ("", 0.0, False, True)
    assert cut.info == info_at(infos, 0) | {"ending": Ending.OUT_OF_TOKENS}
    with pytest.raises(ResetNeededError):
        envs.cut_off(0)
    envs.step((None, "hm"))


def test_episodes_stand_for_questions() -> None:
    envs = lift(num_envs=1)
    assert len(envs.dataset) == 50
    assert envs.dataset.name == "Calculator-v0"
    assert [question.id for question in envs.dataset[48:]] == ["Calculator-v0/148", "Calculator-v0/149"]
    assert envs.dataset[-1].id == "Calculator-v0/149"
    with pytest.raises(IndexError):
        envs.dataset[50]
    with pytest.raises(ConfigurationError, match=r"in \[0, 50\) for environment 'Calculator-v0', or -1 to draw"):
        envs.reset(options={"question_index": 50})
    drawn = [envs.reset(seed=4)[1]["question_id"][0], *(envs.reset()[1]["question_id"][0] for _ in range(20))]
    assert len(set(drawn)) > 5
    assert drawn[:2] == [envs.reset(seed=4)[1]["question_id"][0], envs.reset()[1]["question_id"][0]]


def test_no_more_episodes_are_asked_for_than_there_are() -> None:
    assert len(lift("Silent-v0", 1, action_ends=["</a>"], num_episodes=3).dataset) == 3
    assert len(lift("Silent-v0", 1, action_ends=["</a>"], num_episodes=300).dataset) == 50


def test_our_own_environment_lifted_is_our_own_vector_environment() -> None:
    envs = LiftedVectorEnv("AgenticRAG-v0", 2, range(5), {"max_turns": 2})
    ours = AgenticRAGVectorEnv(2, autoreset_mode="Disabled", max_turns=2)
    prompts, infos = envs.reset(options={"question_index": [3, 4]})
    assert prompts == ours.reset(seed=[3, 4])[0]
    for action in ("<search> who </search>", "hm", "<answer> Ann </answer>"):
        theirs, mine = envs.step((action, None)), ours.step((action, None))
        assert theirs[0] == mine[0]
        for one, other in zip(theirs[1:4], mine[1:4], strict=True):
            assert one.tolist() == other.tolist()
        identified = {"question_id": info_at(infos, 0)["question_id"]}
        assert info_at(theirs[4], 0) == info_at(mine[4], 0) | identified


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id": "Silent-v0"}, "metadata['action_ends'] of Silent-v0 must be a list of the texts that end an action"),
        ({"id": "Silent-v0", "kwargs": {"action_ends": "</a>"}}, "such as ['</answer>'], got '</a>'"),
        ({"id": "Silent-v0", "kwargs": {"action_ends": []}}, "got []"),
        ({"id": "Silent-v0", "kwargs": {"action_ends": ["</a>", ""]}}, "got ['</a>', '']"),
        (
            {"id": "Silent-v0", "kwargs": {"action_ends": ["</a>"], "num_episodes": 0}},
            "metadata['num_episodes'] of Silent-v0 must be an integer of at least 1",
        ),
        ({"id": "CartPole-v1"}, "metadata['action_ends'] of CartPole-v1 must be a list"),
        ({"id": "Calculatr-v0"}, "Gymnasium can't make 'Calculatr-v0': Environment `Calculatr` doesn't exist"),
        ({"id": "a_module:Calculator-v0"}, "name the module that registers it in AGENTIC_RAG_PLUGINS, got 'a_module:"),
        ({"id": "Calculator-v0", "kwargs": {"turns": 1}}, "Calculator-v0 can't be made with kwargs={'turns': 1}"),
        ({"id": "Calculator-v0", "num_dev": 0}, "num_dev must be an integer of at least 1, got 0"),
        ({"id": 5}, "id must be a name such as 'My-v0' alone; name the module that"),
    ],
)
def test_what_is_missing_is_refused_at_the_start(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ENVS.build({"name": "gymnasium", **config}, num_envs=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({}, "must have 'correct', a bool that says whether the task was solved, got None; the info has answer."),
        ({"reward": 1, "correct": 1.0}, "got 1.0; the info has reward, correct, answer."),
        ({"correct": True, "ending": "won"}, "info['ending'] of Silent-v0 must be one of answered, out_of_turns"),
    ],
)
def test_what_is_missing_at_the_end_is_refused_by_name(says: dict[str, Any], message: str) -> None:
    envs = lift("Silent-v0", 1, says=says, action_ends=["</answer>"])
    envs.reset()
    with pytest.raises(ConfigurationError) as caught:
        envs.step(("<answer>1</answer>",))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("says", "terminated", "ending"),
    [
        ({"correct": np.True_}, True, "answered"),
        ({"correct": False, "ending": "out_of_tokens"}, True, "out_of_tokens"),
        ({"correct": False, "error": "no tool"}, False, "search_failed"),
        ({"correct": False}, False, "out_of_turns"),
        ({}, False, "out_of_turns"),  # a time limit can't know what is correct
    ],
)
def test_the_ending_is_what_the_environment_says_or_shows(says: dict[str, Any], terminated: bool, ending: str) -> None:
    envs = lift("Silent-v0", 1, says=says, action_ends=("</answer>",))
    envs.reset()
    for text in ["<answer>1</answer>"] if terminated else ["hm"] * 3:
        infos = envs.step((text,))[4]
    info = info_at(infos, 0)
    assert (info["ending"], info["error"]) == (ending, says.get("error"))
    assert info["correct"] is bool(says.get("correct", False))
    assert type(info["exact_match"]) is float


def test_what_is_no_text_or_no_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"reset of Numbers-v0 must observe a text \(str\), got ndarray"):
        lift("Numbers-v0").reset()
    with pytest.raises(ConfigurationError, match=r"info of Blank-v0 must be a dict, got None\."):
        lift("Blank-v0").reset()
    envs = lift("Raising-v0", 1)
    for action, error, message in (
        ("nan", ConfigurationError, r"reward of Raising-v0 must be a finite number, got nan\."),
        ("none", ConfigurationError, r"reward of Raising-v0 must be a finite number, got None\."),
        ("text", ConfigurationError, r"reward of Raising-v0 must be a finite number, got '1'\."),
        ("list", ConfigurationError, r"reward of Raising-v0 must be a finite number, got \[1\.0\]\."),
        ("no info", ConfigurationError, r"info of Raising-v0 must be a dict, got None\."),
        ("array", ConfigurationError, r"step of Raising-v0 must observe a text \(str\), got ndarray"),
        ("x", ZeroDivisionError, "oops"),
    ):
        envs.reset(options={"question_index": 1})
        with pytest.raises(error, match=message) as caught:
            envs.step((action,))
    assert caught.value.__notes__ == ["In episode Raising-v0/101 of Raising-v0, after the action 'x'"]
    with pytest.raises(ResetNeededError):
        envs.step(("x",))
    with pytest.raises(ConfigurationError, match="one text or None per row, 1, got 'x'"):
        envs.step("x")


def test_from_python_the_id_may_name_the_module() -> None:
    with pytest.raises(ConfigurationError, match=r"Gymnasium can't make .* No module named 'no_such_module'"):
        lift("no_such_module:Calculator-v0")


class Split(Calculator):
    def __init__(self, split: str) -> None:
        super().__init__()
        self.split = split

    def reset(self, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        super().reset(**kwargs)
        return self.split, {}


def test_an_environment_may_be_told_the_split() -> None:
    gymnasium.register("Split-v0", entry_point=Split)
    config = {"name": "gymnasium", "id": "Split-v0", "split_argument": "split"}
    for split in ("train", "dev", "test"):
        assert ENVS.build(config, num_envs=2, split=split).reset()[0] == (split, split)


def test_splits_share_no_episode() -> None:
    config = {"name": "gymnasium", "id": "Calculator-v0", "num_train": 30, "num_dev": 4, "num_test": 6}
    made = {split: ENVS.build(config, num_envs=2, split=split) for split in ("train", "dev", "test")}
    ids = {split: {question.id for question in envs.dataset} for split, envs in made.items()}
    assert {split: len(of) for split, of in ids.items()} == {"train": 30, "dev": 4, "test": 6}
    assert len(set.union(*ids.values())) == 40
    with pytest.raises(ConfigurationError, match=r"one of train, dev, test, got 'tset'\. Did you mean 'test'"):
        ENVS.build(config, num_envs=2, split="tset")
    assert issubclass(ENVS.get("gymnasium").config or object, BringsQuestions)
    assert not issubclass(ENVS.get("agentic_rag").config or object, BringsQuestions)
    with pytest.raises(UnknownNameError):
        ENVS.build("gymnasum")


def test_numbers_of_infos_keep_their_values_whatever_ends_beside_them() -> None:
    envs = lift("Scored-v0", 3)
    envs.reset()
    infos = envs.step(("0", "2 / 3", "np.float32(0.5)"))[4]
    assert [info_at(infos, row)["f1"] for row in range(3)] == [0.0, 2 / 3, 0.5]
    assert all(type(info_at(infos, row)["f1"]) is float for row in range(3))
    envs.reset()
    with pytest.raises(ConfigurationError, match=r"info\['f1'\] of Scored-v0 must be a finite number, got 'much'"):
        envs.step(("'much'", None, None))


class Says(Calculator):
    """Puts what the action spells into its info, and goes on."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, False, False, eval(action)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("{'answer': 42}", "info['answer'] of Says-v0 must be a text (str), or None, got 42"),
        ("{'action': 1}", "info['action'] of Says-v0 must be a text (str), or None, got 1"),
        ("{'query': ['a']}", "info['query'] of Says-v0 must be a text (str), or None, got ['a']"),
        ("{'error': ''}", "info['error'] of Says-v0 must be a text (str) that is not empty, or None, got ''"),
        ("{'error': ValueError('x')}", "info['error'] of Says-v0 must be a text (str) that is not empty, or None"),
        (
            "{'passages': ['Ohm']}",
            "info['passages'] of Says-v0 must be a list of Passage (from agentic_rag_env), got [",
        ),
        (
            "{'passages': None}",
            "info['passages'] of Says-v0 must be a list of Passage (from agentic_rag_env), got None",
        ),
    ],
)
def test_texts_and_passages_of_infos_are_checked_at_the_first_step(says: str, message: str) -> None:
    envs = lift("Says-v0", 2)
    envs.reset()
    for actions in ((says, "{}"), ("{}", says)):  # the first row decides the type of a column
        envs.reset()
        with pytest.raises(ConfigurationError) as caught:
            envs.step(actions)
        assert message in str(caught.value)


def test_texts_and_passages_of_infos_are_passed_on() -> None:
    envs = lift("Says-v0", 2)
    envs.reset()
    passage = Passage("p", "Ohm's law")
    infos = envs.step((f"{{'answer': '42', 'passages': [{passage!r}], 'error': 'gone'}}", "{'query': None}"))[4]
    told = info_at(infos, 0)
    assert (told["answer"], told["passages"], told["error"]) == ("42", (passage,), "gone")
    assert (info_at(infos, 1)["query"], info_at(infos, 1)["passages"]) == (None, ())


def test_infos_are_those_of_every_environment() -> None:
    envs = lift(num_envs=1)
    infos = [envs.reset()[1], envs.step(("hm",))[4], envs.step(("<answer>1</answer>",))[4]]
    assert all(list(info_at(info, 0)) == list(StepInfo.__annotations__) for info in infos)
