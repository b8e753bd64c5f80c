"""What a run was asked and what it searched: told apart where data differ, and where nothing else does."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from agentic_rag_env import AgenticRAGVectorEnv, ConfigurationError, Passage
from agentic_rag_env.corpus import open_corpus
from agentic_rag_env.registry import DATASETS
from algorithms import evaluate
from algorithms.analysis.comparison.checks import check
from algorithms.analysis.comparison.methods import make_methods
from algorithms.analysis.comparison.study import Options, study
from algorithms.analysis.runs import find_runs
from algorithms.assets import ASSETS
from algorithms.learner.networks import load_tokenizer
from algorithms.training.fingerprints import fingerprints, of_playing

PASSAGES = [("p0", "Ada\nAda was born in Rome."), ("p1", "Bob\nBob lives in Oslo.")]
QUESTIONS = [("q0", "Where was Ada born?", ["Rome"]), ("q1", "Where does Bob live?", ["Oslo", "oslo"])]


def write_files(folder: Path, passages=PASSAGES, questions=QUESTIONS) -> dict[str, str]:
    """A dataset of two files, as settings."""
    folder.mkdir(exist_ok=True)
    corpus, asked = folder / "corpus.jsonl", folder / "questions.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "contents": c}) + "\n" for i, c in passages))
    rows = [{"id": i, "question": text, "golden_answers": answers} for i, text, answers in questions]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "jsonl", "questions": str(asked), "corpus": str(corpus)}


def found(dataset, retriever="bm25", num_tested=2):
    envs = AgenticRAGVectorEnv(2, dataset=dataset, retriever=retriever)
    return fingerprints(envs, num_tested, envs.dataset)


def test_they_are_hashes_of_what_the_files_say(tmp_path):
    told = found(write_files(tmp_path), num_tested=1)
    rows = [["q0", "Where was Ada born?", ["Rome"]], ["q1", "Where does Bob live?", ["Oslo", "oslo"]]]
    assert told["questions"] == hashlib.blake2b(json.dumps(rows[:1]).encode(), digest_size=16).hexdigest()
    assert told["training_questions"] == hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    for text in (text for passage in PASSAGES for text in passage):
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    assert told["corpus"] == digest.hexdigest()


def test_where_the_files_lie_and_how_they_are_searched_makes_no_difference(tmp_path):
    here, there = write_files(tmp_path / "here"), write_files(tmp_path / "there")
    store = here | {"corpus": str(open_corpus(here["corpus"]).path)}
    cached = {"name": "cached", "retriever": "bm25", "path": str(tmp_path / "cache.sqlite")}
    assert found(here) == found(there) == found(store) == found(here, cached)


def test_each_tells_its_own_part(tmp_path):
    first = found(write_files(tmp_path / "a"))

    def differing(other) -> set[str]:
        return {name for name in first if first[name] != other[name]}

    changed = [PASSAGES[0], ("p1", "Bob\nBob lives in Rome.")]
    assert differing(found(write_files(tmp_path / "b", changed))) == {"corpus", "retriever"}
    assert differing(found(write_files(tmp_path / "c"), {"name": "bm25", "k1": 1.5})) == {"retriever"}
    reworded = [QUESTIONS[0], ("q1", "Where is Bob?", ["Oslo", "oslo"])]
    told = found(write_files(tmp_path / "d", questions=reworded))
    assert differing(told) == {"questions", "training_questions"}
    assert differing(found(write_files(tmp_path / "e", questions=reworded), num_tested=1)) >= {"training_questions"}


def test_a_corpus_on_disk_is_not_read_for_it(tmp_path):
    dataset = write_files(tmp_path)
    envs = AgenticRAGVectorEnv(2, dataset=dataset | {"corpus": str(open_corpus(dataset["corpus"]).path)})
    reading = AssertionError("the passages are read")
    with (
        patch.object(type(envs.dataset.corpus), "__iter__", side_effect=reading),
        patch.object(type(envs.dataset.corpus), "__getitem__", side_effect=reading),
    ):
        assert fingerprints(envs, 2)["corpus"] == envs.dataset.corpus.fingerprint


class Unnamed:
    """Searches who knows what."""

    def search(self, queries, top_k):
        return [[Passage("p", "P\np")] for _ in queries]


class Silent(Unnamed):
    """A service that does not say what it searches."""

    @property
    def fingerprint(self):
        raise ConfigurationError("the service does not tell what it searches.")


def test_what_does_not_tell_is_not_known(tmp_path):
    dataset = write_files(tmp_path)
    assert found(dataset, Unnamed())["retriever"] is None
    with pytest.warns(UserWarning, match="not known to the summary: the service does not tell"):
        assert found(dataset, Silent())["retriever"] is None
    without_corpus = found(dataset | {"corpus": None}, Unnamed())
    assert (without_corpus["corpus"], without_corpus["questions"]) == (None, found(dataset)["questions"])


def test_another_corpus_under_the_same_name_is_refused(tmp_path):
    """Two models are scored with the same command; in between somebody replaces the file."""

    def score(model: str, dataset: dict[str, str]) -> dict:
        settings = [f"dataset.{key}={value}" for key, value in dataset.items() if key != "name"]
        line = [f"checkpoint={model}", "dataset=jsonl", *settings, "dataset.split=all", "evaluation.temperatures=[0]",
                "probes=[]", "threads=1", "num_envs=2", "rollout.max_new_tokens=4", "env.max_turns=1",
                f"hydra.run.dir={tmp_path / 'runs' / model}"]  # fmt: skip
        with patch.object(sys, "argv", ["evaluate", *line]):
            evaluate.main()
        return json.loads((tmp_path / "runs" / model / "summary.json").read_text())["fingerprints"]

    before = score("tiny-student", write_files(tmp_path / "data"))
    after = score("tiny-teacher", write_files(tmp_path / "data", [*PASSAGES, ("p2", "Eve\nEve is a spy.")]))
    both = f"{before['corpus']} in tiny-student, but {after['corpus']} in tiny-teacher"
    with pytest.raises(ConfigurationError, match=f"another corpus: the fingerprint is {both}"):
        study([tmp_path / "runs"], Options())
    (tmp_path / "runs" / "tiny-teacher" / "summary.json").unlink()
    score("tiny-teacher", write_files(tmp_path / "data"))
    assert not any(finding.refuses for finding in check(make_methods(find_runs([tmp_path / "runs"]))))


def test_what_ends_a_text_and_what_a_template_makes_of_a_message_count(tmp_path):
    data = DATASETS.build(write_files(tmp_path))

    def key(**changes):
        tokenizer = load_tokenizer(ASSETS / "tiny-student")
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return of_playing({}, "a hub id", tokenizer, data)

    assert key() == key()
    ends = key(eos_token="?")
    template = key(chat_template="{{ messages[0].content }}")
    assert len({key(), ends, template}) == 3
