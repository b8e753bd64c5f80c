"""The benchmarks in their published formats, from files and from a hub repository, and mixtures of datasets."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import conf
from agentic_rag_env import DATASETS, ConfigurationError, DataError, Passage, Question, QuestionSet
from algorithms.launch.hydra_launcher import register_launcher
from algorithms.learner.types import Trajectory, Turn
from algorithms.training.evaluation import measure
from algorithms.training.schemas import register_schemas
from algorithms.training.typed import run_config

register_schemas()
register_launcher()

PRESETS = sorted(path.stem for path in (Path(conf.__file__).parent / "dataset").glob("*.yaml"))
#: Questions of the published test sets, as in FlashRAG and the papers that use it; together 51,713.
TEST_SIZES = {
    "nq": ("test", 3610),
    "triviaqa": ("test", 11313),
    "popqa": ("test", 14267),
    "hotpotqa": ("dev", 7405),
    "2wikimultihopqa": ("dev", 12576),
    "musique": ("dev", 2417),
    "bamboogle": ("test", 125),
}


def flashrag(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{split}_{i}", "question": f"{split} {i}?", "golden_answers": [f"answer {i}"]} for i in range(count)
    ]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text)
        return path
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def load(**settings: Any) -> QuestionSet:
    return DATASETS.build({"name": "benchmark", **settings})


def mix(sources: dict[str, Any], **settings: Any) -> QuestionSet:
    return DATASETS.build({"name": "mixture", "sources": sources, **settings})


def ids(questions: Iterable[Question]) -> list[str]:
    return [question.id for question in questions]


def composed(*overrides: str, config: str = "config") -> Any:
    with initialize_config_module("conf", version_base="1.3"):
        return compose(config, list(overrides))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_flashrag_folder(tmp_path: Path, ending: str) -> None:
    metadata = {"type": "bridge", "level": None, "context": {"title": ["long"], "sentences": [["text"]]}}
    rows = [{"id": "test_0", "question": "who?", "golden_answers": ["Ann", "A."], "metadata": metadata}]
    write(tmp_path / "nq" / f"test{ending}", rows)
    write(tmp_path / "nq" / "train.jsonl", flashrag("train", 2))
    expected = [Question("test_0", "who?", ("Ann", "A."), {"dataset": "nq", "type": "bridge"})]
    assert list(load(subset="nq", path=str(tmp_path), split="test")) == expected
    assert list(load(subset="nq", path=str(tmp_path / "nq"), split="test")) == expected
    assert list(load(subset="nq", path=str(tmp_path / "nq" / f"test{ending}"), split="test")) == expected
    assert ids(load(path=str(tmp_path / "nq"))) == ["train_0", "train_1"]
    assert load(path=str(tmp_path / "nq")).name == "nq"


def test_search_r1_parquet(tmp_path: Path) -> None:
    """As scripts/data_process of Search-R1 writes it: ids that repeat, and no metadata for one of the sources."""
    prompt = "Answer the given question. For example, <answer> Beijing </answer>. Question: {}\n"

    def row(source: str, index: int, text: str, target: list[str]) -> dict[str, Any]:
        return {
            "id": f"train_{index}",
            "data_source": source,
            "prompt": [{"role": "user", "content": prompt.format(text)}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": target}},
            "extra_info": {"split": "train", "index": index},
            "metadata": None if source == "nq" else {"type": "bridge"},
        }

    rows = [row("nq", 0, "who: Question: what?", ["Ann", "A."]), row("hotpotqa", 0, "where?", ["Rome"])]
    file = write(tmp_path / "train.parquet", rows)
    expected = [
        Question("nq/train_0", "who: Question: what?", ("Ann", "A."), {"dataset": "nq"}),
        Question("hotpotqa/train_0", "where?", ("Rome",), {"dataset": "hotpotqa", "type": "bridge"}),
    ]
    assert list(load(path=str(file))) == expected
    assert list(DATASETS.build({"name": "jsonl", "questions": str(file)})) == expected


def test_a_prompt_behind_a_system_message_and_answers_in_the_way_of_verl(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Question: is what you will be asked."}
    shot = [{"role": "user", "content": "Question: an example?"}, {"role": "assistant", "content": "Question: none"}]
    asked = {"role": "user", "content": "Think. Question: where?"}
    rows = [
        {"prompt": [system, asked], "reward_model": {"ground_truth": "Rome"}},
        {"prompt": [*shot, asked], "reward_model": {"ground_truth": ["Rome", "Roma"]}},
        {"prompt": [asked], "reward_model": {"ground_truth": {"target": "Rome"}}},
    ]
    file = write(tmp_path / "train.jsonl", rows)
    questions = DATASETS.build({"name": "jsonl", "questions": str(file)})
    assert {question.text for question in questions} == {"where?"}
    assert [question.golden_answers for question in questions] == [("Rome",), ("Rome", "Roma"), ("Rome",)]


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ("['George Rankin', 'G. Rankin']", ("George Rankin", "G. Rankin")),
        ('["politician", "statesman"]', ("politician", "statesman")),
        (['["politician", "statesman"]'], ("politician", "statesman")),
        (["Rome", "['Roma']"], ("Rome", "Roma")),
        ("['Rome' 'Roma']", ("Rome", "Roma")),  # as NumPy prints an array
        ("['Rome'\n \"d'Or\" 'x, y']", ("Rome", "d'Or", "x, y")),
        ('["x" "y"]', ("x", "y")),
        ("['a' 'b', 'c']", ("['a' 'b', 'c']",)),
        ("['a', ['b']]", ("['a', ['b']]",)),
        ("[b'a' 'b']", ("[b'a' 'b']",)),
        ("""["O'Brien", 'say "x"']""", ("O'Brien", 'say "x"')),
        ("[1, 2]", ("[1, 2]",)),
        ("[sic]", ("[sic]",)),
        ("['a', 1]", ("['a', 1]",)),
        ("['a'] and ['b']", ("['a'] and ['b']",)),
        ("['a', __import__('os').getcwd(), 'b']", ("['a', __import__('os').getcwd(), 'b']",)),
        ("['" + "[" * 90_000 + "']", ("[" * 90_000,)),
        ("['a'" + "+['b'" * 9_000 + "]", ("['a'" + "+['b'" * 9_000 + "]",)),
    ],
)
def test_a_list_of_answers_written_as_text_is_a_list(tmp_path: Path, given: Any, answers: tuple[str, ...]) -> None:
    file = write(tmp_path / "train.jsonl", [{"question": "what?", "golden_answers": given}])
    (question,) = DATASETS.build({"name": "jsonl", "questions": str(file)})
    assert question.golden_answers == answers


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "system", "content": "Question: who?"}], "row 1, field 'prompt': has no question after 'Question:'"),
        ([{"content": "What now?"}], "row 1, field 'prompt': has no question after 'Question:'"),
        ([], "row 1, field 'prompt': expected a list of messages, got list"),
        ("Question: who?", "row 1, field 'prompt': expected a list of messages, got str"),
    ],
)
def test_a_prompt_without_a_question(tmp_path: Path, prompt: Any, message: str) -> None:
    row = {"prompt": prompt, "golden_answers": ["a"]}
    with pytest.raises(DataError, match=message):
        load(path=str(write(tmp_path / "train.parquet", [row])))


def test_dev_is_a_hundredth_of_train_where_they_are_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", flashrag("train", 3000))
    write(tmp_path / "dev.jsonl", flashrag("dev", 10))
    settings = {"path": str(tmp_path), "splits": {"dev": "train", "test": "dev"}}
    train, dev, test = (ids(load(**settings, split=split)) for split in ("train", "dev", "test"))
    assert sorted(train + dev) == sorted(f"train_{i}" for i in range(3000))
    assert 10 < len(dev) < 55  # 30, with a standard deviation of 5.4
    assert test == [f"dev_{i}" for i in range(10)]
    # Pinned (by `printf train_187 | b2sum -l 64`): another division would train on what old runs held out.
    assert dev[:2] == ["train_187", "train_368"]


def test_another_size_than_published_is_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "test.jsonl", flashrag("test", 3))
    load(subset="nq", path=str(tmp_path), split="test", sizes={"test": 3})
    assert not caplog.records
    load(subset="nq", path=str(tmp_path), split="test", sizes={"test": 3610}, num_questions=2)
    (record,) = caplog.records
    assert "has 3 questions, but the published split test of nq has 3610" in record.getMessage()


def test_exploded_answers_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = flashrag("test", 6)
    rows[1]["golden_answers"] = ["[", "J", "'", "s", "o", "n", "]"]
    rows[2]["golden_answers"] = ["a", "b", "c"]
    rows[3]["golden_answers"] = ["7", "8", "9"]
    rows[4]["golden_answers"] = ["A", "B", "C", "×"]
    rows[5]["golden_answers"] = ["a", "b"]
    questions = load(path=str(write(tmp_path / "test.jsonl", rows)), split="test")
    assert ids(questions) == ["test_0", "test_3", "test_4", "test_5"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "left out 2 questions" in record.getMessage()
    assert "line 2" in record.getMessage()


def test_sample_and_corpus(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", flashrag("test", 50))
    corpus = write(tmp_path / "c.jsonl", [{"id": "p", "contents": "x"}])
    settings = {"path": str(tmp_path), "split": "test", "corpus": str(corpus)}
    five, same, other = (load(**settings, num_questions=5, seed=seed) for seed in (0, 0, 1))
    assert ids(five) == ids(same) != ids(other)
    assert set(ids(five)) < set(ids(load(**settings, num_questions=20)))
    assert list(five.corpus or ()) == [Passage("p", "x")]
    assert five.corpus is other.corpus


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"split": "tset"}, ConfigurationError, "one of train, dev, test, got 'tset'. Did you mean 'test'"),
        ({"splits": {"tset": "dev"}}, ConfigurationError, "one of train, dev, test, got 'tset'. Did you mean 'test'"),
        ({"splits": {"train": None, "dev": None}}, ConfigurationError, "nq has no split 'train', only test"),
        ({"splits": {"train": "test"}, "split": "test"}, ConfigurationError, "train and test are both the published"),
        ({"splits": {"test": "dev"}}, ConfigurationError, "dev and test are both the published split 'dev'"),
        (
            {"split": "dev"},
            DataError,
            "has no file dev{.jsonl,.jsonl.gz,.jsonl.zst,.parquet,.arrow}.*found: train.jsonl",
        ),
        ({"split": "dev", "splits": {"dev": "train"}}, DataError, "too small for a hundredth of it"),
        ({"num_questions": 3}, ConfigurationError, "as many as split 'train' of nq has, or None for all, got 3"),
        ({"path": "{}/none"}, DataError, "none: has no file train.*found: nothing"),
        ({"path": "{}/train.jsonl", "split": "test"}, DataError, "would be called test.jsonl"),
        ({"pth": "x"}, ConfigurationError, "no setting 'pth'. Did you mean 'path'"),
    ],
)
def test_what_can_not_be(tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    write(tmp_path / "train.jsonl", flashrag("train", 2))
    path = settings.pop("path", "{}").format(tmp_path)
    with pytest.raises(error) as caught:
        load(subset="nq", path=path, **settings)
    assert all(part in str(caught.value) for part in message.split(".*"))


# --- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local copy of a hub repository with two configurations, laid out as FlashRAG's is."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "FlashRAG_datasets"
    write(folder / "nq" / "test.jsonl", flashrag("test", 3))
    write(folder / "hotpotqa" / "dev.jsonl", [{**row, "metadata": {"type": "bridge"}} for row in flashrag("dev", 2)])
    files = {"nq": "test", "hotpotqa": "dev"}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}.jsonl\n"
        for name, split in files.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def test_from_the_hub(repository: str) -> None:
    nq = load(hub=repository, subset="nq", split="test", sizes={"test": 3})
    assert nq[2] == Question("test_2", "test 2?", ("answer 2",), {"dataset": "nq"})
    hotpotqa = load(hub=repository, subset="hotpotqa", split="test", splits={"dev": "train", "test": "dev"})
    assert ids(hotpotqa) == ["dev_0", "dev_1"]
    assert hotpotqa[0].metadata == {"dataset": "hotpotqa", "type": "bridge"}


def test_what_the_hub_does_not_have(repository: str) -> None:
    with pytest.raises(DataError, match=r"\(squad\), split test: can't be loaded from the hub: .*squad"):
        load(hub=repository, subset="squad", split="test")
    with pytest.raises(DataError, match=r"\(nq\), split train: can't be loaded.* give dataset.path=<folder>"):
        load(hub=repository, subset="nq", split="train")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'agentic-rag-env\[hub\]'; or give dataset.path"):
        load(subset="nq", split="test")


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Sources of 12 and of 4 questions with the same ids."""
    for name, count in (("nq", 12), ("hotpotqa", 4)):
        for split in ("train", "dev", "test"):
            write(tmp_path / name / f"{split}.jsonl", flashrag(split, count))
    return {name: {"name": "benchmark", "subset": name, "path": str(tmp_path)} for name in ("nq", "hotpotqa")}


def of_source(questions: Iterable[Question], source: str) -> int:
    return sum(question.id.startswith(f"{source}/") for question in questions)


def test_by_size(two: dict[str, Any]) -> None:
    questions = mix(two)
    assert len(questions) == len(set(ids(questions))) == 16
    assert sorted(ids(questions)) == sorted(
        [f"nq/train_{i}" for i in range(12)] + [f"hotpotqa/train_{i}" for i in range(4)]
    )
    assert questions.name == "nq+hotpotqa"
    # Each quarter holds three of one and one of the other, and each source stands in its own order.
    assert [of_source(questions[start : start + 4], "hotpotqa") for start in range(0, 16, 4)] == [1, 1, 1, 1]
    assert [name for name in ids(questions) if name.startswith("hotpotqa")] == [f"hotpotqa/train_{i}" for i in range(4)]
    assert {question.metadata["dataset"] for question in questions} == {"nq", "hotpotqa"}


@pytest.mark.parametrize(
    ("weights", "num_questions", "counts"),
    [
        ({"nq": 1, "hotpotqa": 1}, None, (4, 4)),  # the scarcer source is taken whole
        ({"nq": 2}, None, (8, 4)),  # 1 where none is given
        ({"nq": 0.3, "hotpotqa": 0.1}, None, (12, 4)),
        ({"nq": 10}, None, (12, 1)),  # 12 : 1.2
        ({"nq": 1, "hotpotqa": 1}, 6, (3, 3)),
        ({"nq": 1, "hotpotqa": 2}, 5, (2, 3)),  # 1.67 : 3.33
        ({}, 8, (6, 2)),
        ({}, 1, (1, 0)),
    ],
)
def test_weights(
    two: dict[str, Any], weights: dict[str, float], num_questions: int | None, counts: tuple[int, int]
) -> None:
    questions = mix(two, weights=weights, num_questions=num_questions)
    assert (of_source(questions, "nq"), of_source(questions, "hotpotqa")) == counts
    assert len(set(ids(questions))) == len(questions)


def test_the_seed_decides_what_is_drawn(two: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"weights": {"nq": 1, "hotpotqa": 1}}
    first, same, other = (ids(mix(two, **settings, seed=seed)) for seed in (0, 0, 1))
    assert first == same != other
    script = (
        "import sys, json; from agentic_rag_env import DATASETS\n"
        "print(json.dumps([q.id for q in DATASETS.build(json.loads(sys.argv[1]))]))"
    )
    spec = json.dumps({"name": "mixture", "sources": two, **settings})
    done = subprocess.run(
        [sys.executable, "-c", script, spec],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == first


def test_members_of_a_split(two: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"members": {"train": ["hotpotqa"]}}
    assert of_source(mix(two, **settings), "nq") == 0
    assert len(mix(two, **settings)) == 4
    assert ids(mix(two, **settings, split="test"))[:2] == ["nq/test_0", "nq/test_1"]
    assert len(mix(two, **settings, split="test")) == 16


def test_sources_of_every_kind(two: dict[str, Any], tmp_path: Path) -> None:
    own = QuestionSet("own", [Question("q", "?", ("a",))])
    questions = mix({"tiny": "tiny", "own": own, "nq": {"name": "benchmark", "subset": "nq"}}, path=str(tmp_path))
    assert (of_source(questions, "tiny"), of_source(questions, "own"), of_source(questions, "nq")) == (2000, 1, 12)
    assert {question.metadata["dataset"] for question in questions} == {"single_hop", "multi_hop", "own", "nq"}
    assert questions.corpus is not None  # the only one there is
    tests = mix({"tiny": {"name": "tiny", "split": "train", "num_questions": 5}}, split="test")
    assert ids(tests) == [
        f"tiny/{name}" for name in ids(DATASETS.build({"name": "tiny", "split": "test", "num_questions": 5}))
    ]


def test_the_splits_of_many_sources_share_one_corpus(tmp_path: Path) -> None:
    sources = {}
    for name in "abcdefg":
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", flashrag(split, 1))
        corpus = write(tmp_path / f"{name}.jsonl", [{"id": name, "contents": name}])
        sources[name] = {"name": "benchmark", "path": str(tmp_path / name), "corpus": str(corpus)}
    train, test = mix(sources), mix(sources, split="test")
    assert [passage.id for passage in train.corpus or ()] == list("abcdefg")
    assert train.corpus is test.corpus


def test_one_corpus_for_all(two: dict[str, Any], tmp_path: Path) -> None:
    for name in two:
        passages = [{"id": "both", "contents": "in both"}, {"id": name, "contents": name}]
        two[name]["corpus"] = str(write(tmp_path / f"{name}-corpus.jsonl", passages))
    train, test = mix(two), mix(two, split="test")
    assert [passage.id for passage in train.corpus or ()] == ["both", "nq", "hotpotqa"]
    assert train.corpus is test.corpus  # one retriever serves both
    two["nq"]["corpus"] = str(write(tmp_path / "other.jsonl", [{"id": "both", "contents": "only here"}]))
    with pytest.raises(ConfigurationError, match=r"2 corpora, and id 'both' stands for different .* give corpus="):
        mix(two)
    whole = str(write(tmp_path / "whole.jsonl", [{"id": name, "contents": name} for name in two]))
    train, test = mix(two, corpus=whole), mix(two, corpus=whole, split="test")
    assert [passage.id for passage in train.corpus or ()] == ["nq", "hotpotqa"]
    assert train.corpus is test.corpus


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": {}}, "mixture needs sources"),
        ({"weights": {"hotpot": 1}}, "no source 'hotpot'. Did you mean 'hotpotqa'"),
        ({"members": {"train": ["hotpot"]}}, "no source 'hotpot'. Did you mean 'hotpotqa'"),
        ({"members": {"train": []}}, "split 'train' has no sources"),
        ({"weights": {"nq": 0}}, "the weight of source 'nq' must be a finite number above 0 (leave a source"),
        ({"weights": {"nq": float("inf")}}, "got inf"),
        ({"num_questions": 17}, "sources of {'nq': 12, 'hotpotqa': 4} questions with weights by size give"),
        ({"num_questions": 9, "weights": {"nq": 1}}, "questions with weights {'nq': 1"),
        ({"num_questions": 0}, "or None for the most, got 0"),
    ],
)
def test_what_can_not_be_mixed(two: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        mix(**{"sources": two, **settings})
    assert message in str(caught.value)


def test_an_episode_of_a_mixture(two: dict[str, Any]) -> None:
    env = gymnasium.make(
        "AgenticRAG-v0", dataset={"name": "mixture", "sources": two}, retriever={"name": "static", "passages": []}
    )
    _, info = env.reset(seed=0, options={"question_index": 0})
    assert info["question_id"] == "nq/train_0"
    _, reward, terminated, _, _ = env.step("<answer> answer 0 </answer>")
    assert (reward, terminated) == (1.0, True)


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_presets_are_those_of_the_published_table() -> None:
    assert set(PRESETS) == {*TEST_SIZES, "nq_hotpotqa", "seven_benchmarks", "search_r1"}
    total = 0
    for name, (published, size) in TEST_SIZES.items():
        preset = run_config(composed(f"dataset={name}")).dataset
        assert (preset["name"], preset["subset"]) == ("benchmark", name)
        assert preset["splits"]["test"] == published
        assert preset["sizes"][published] == size
        total += preset["sizes"][published]
    assert total == 51_713


def published_files(folder: Path, spec: dict[str, Any]) -> None:
    """Files of 200 questions for the splits that a benchmark has."""
    for split in {split for split in spec["splits"].values() if split}:
        write(folder / spec["subset"] / f"{split}.jsonl", flashrag(split, 200))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", ["config", "evaluate"])
def test_every_preset_builds_from_a_folder(tmp_path: Path, name: str, config: str) -> None:
    overrides = [f"dataset={name}", f"dataset.path={tmp_path}", *(["checkpoint=x"] if config == "evaluate" else [])]
    spec: Any = OmegaConf.to_container(composed(*overrides, config=config).dataset, resolve=True)
    sources = spec.get("sources", {name: spec})
    for source in sources.values():
        published_files(tmp_path, source)
    splits = ["train", "dev", "test"]
    if config == "evaluate" or name in ("popqa", "bamboogle", "seven_benchmarks"):
        assert spec["split"] == "test"
        splits = ["test"]
    built = {split: DATASETS.build({**spec, "split": split}) for split in splits}
    assert len(built["test"]) == 200 * len(sources)
    asked = {question.metadata["dataset"] for question in built["test"]}
    assert asked == {source["subset"] for source in sources.values()}
    if "train" in built:
        texts = [{(q.metadata["dataset"], q.text) for q in questions} for questions in built.values()]
        assert len(set.union(*texts)) == sum(map(len, texts))


def test_the_protocol_of_search_r1() -> None:
    preset = run_config(composed("dataset=search_r1")).dataset
    assert list(preset["sources"].values())[4]["subset"] == "2wikimultihopqa"
    assert [source["subset"] for source in preset["sources"].values()] == list(TEST_SIZES)
    assert preset["members"] == {"train": ["nq", "hotpotqa"], "dev": ["nq", "hotpotqa"]}


def test_settings_on_the_command_line() -> None:
    spec = run_config(
        composed("dataset=nq_hotpotqa", "+dataset.weights={nq: 1, hotpotqa: 3}", "dataset.sources.nq.splits.test=dev")
    ).dataset
    assert spec["weights"] == {"nq": 1.0, "hotpotqa": 3.0}
    assert spec["sources"]["nq"]["splits"] == {"train": "train", "dev": "dev", "test": "dev"}
    sources = "{easy: {name: tiny, subset: single_hop}, hard: {name: tiny, subset: multi_hop, num_questions: 300}}"
    spec = run_config(composed("dataset=mixture", f"+dataset.sources={sources}", "+dataset.weights.easy=0.5")).dataset
    questions = DATASETS.build(spec)
    assert (of_source(questions, "easy"), of_source(questions, "hard")) == (150, 300)
    assert questions.corpus == DATASETS.build("tiny").corpus


def test_the_union_is_measured_by_dataset_and_on_average(two: dict[str, Any]) -> None:
    """12 questions of one and 4 of the other; all of NQ wrong and all of HotpotQA right."""
    questions = mix(two, split="test")
    no_ids = np.zeros(0, np.int64)
    trajectories = []
    for question in questions:
        right = question.id.startswith("hotpotqa/")
        info: Any = {"answer": question.golden_answers[0] if right else "no idea", "f1": float(right), "error": None}
        turn = Turn(
            no_ids, np.zeros(0, np.float32), no_ids, info | {"num_searches": 0, "action": "answer", "correct": right}
        )
        trajectories.append(Trajectory(no_ids, [turn], 0, "policy", float(right), right, True, False))
    figures = measure(trajectories, questions)
    assert figures["all"]["exact_match"] == 4 / 16
    assert figures["all"]["macro_exact_match"] == 0.5
    assert (figures["nq"]["n"], figures["nq"]["exact_match"]) == (12, 0.0)
    assert (figures["hotpotqa"]["n"], figures["hotpotqa"]["exact_match"]) == (4, 1.0)
