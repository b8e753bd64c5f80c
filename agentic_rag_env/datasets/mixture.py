"""Mixes several datasets into one, in proportions that the user chooses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from typing import Any

from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.selection import sample
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, did_you_mean
from agentic_rag_env.settings import COUNT, Allowed, check_value
from agentic_rag_env.types import Passage, Question

#: Corpora that have been joined, by their identities (kept here, so that no other object takes them), and the result.
_JOINED: dict[tuple[int, ...], tuple[Sequence[Sequence[Passage]], list[Passage]]] = {}


@dataclass
class MixtureConfig:
    """What is mixed, and how much of each.

    Attributes:
        sources: Datasets by names that the user chooses. Each is a registered name, or a mapping with `name` and
            settings; its `split` is that of the mixture.
        weights: Proportions in which a split holds the sources; a source that is not named has weight 1. The split is
            as large as it can be without repeating a question: the source that is scarcest for its weight is taken
            whole. Without weights, the split holds every question of every source.
        members: The sources of a split where not all belong to it, such as `{train: [nq, hotpotqa]}`.
        path: Value for the sources that have a setting `path` and leave it open.
        corpus: File of passages for all sources (see `agentic_rag_env.corpus.read_corpus`); None: the passages that the
            sources bring, joined in memory; one that several bring is there once.
        split: `train`, `dev` or `test`.
        num_questions: Size of the split, divided by weight; None: as large as it can be.
        seed: Decides which questions of a source are drawn; the same seed draws the same ones.
    """

    sources: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    path: str | None = None
    corpus: str | None = None
    split: str = "train"
    num_questions: int | None = None
    seed: int = 0


@DATASETS.register("mixture", MixtureConfig)
def mixture(config: MixtureConfig) -> QuestionSet:
    """Mix datasets.

    The sources are spread evenly, each in its own order, so that the first n questions hold them in nearly the same
    proportions as the whole. An id becomes `<source>/<id>`, because published files number their questions alike. The
    `dataset` of the metadata, by which figures are grouped, stays.

    Raises:
        ConfigurationError: There are no sources, a name or a weight can't work, more questions are asked for than there
            are, or two sources give one passage id to different texts.
        DataError: The files of a source are missing or malformed.
    """
    names = _members(config)
    parts = {name: _build(config.sources[name], config) for name in names}
    counts = _counts({name: len(part) for name, part in parts.items()}, _weights(config, names), config.num_questions)
    drawn = []
    for name, part in parts.items():
        if counts[name]:
            chosen = sample(part, counts[name], config.seed, f"source {name!r}")
            drawn.append([_renamed(question, name, part.name) for question in chosen])
    return QuestionSet("+".join(names), _spread(drawn), _corpus(config, list(parts.values())))


def _members(config: MixtureConfig) -> list[str]:
    if not config.sources:
        raise ConfigurationError("mixture needs sources, such as sources={nq: {name: benchmark, subset: nq}}.")
    given = [*config.weights, *(name for names in config.members.values() for name in names)]
    for name in given:
        if name not in config.sources:
            raise ConfigurationError(f"mixture has no source {name!r}.{did_you_mean(name, config.sources)}")
    names = config.members.get(config.split, list(config.sources))
    if not names:
        raise ConfigurationError(f"members: split {config.split!r} has no sources; name at least one.")
    return names


def _build(spec: Any, config: MixtureConfig) -> QuestionSet:
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, Mapping):
        spec = {**spec, "split": config.split}
        if config.path is not None and spec.get("path") is None and _has_path(spec.get("name")):
            spec["path"] = config.path
    built: QuestionSet = DATASETS.build(spec)
    return built


def _has_path(name: Any) -> bool:
    return name in DATASETS.names() and "path" in DATASETS.get(name).settings


def _weights(config: MixtureConfig, names: Sequence[str]) -> dict[str, float]:
    if not config.weights:
        return {}
    weights = {name: config.weights.get(name, 1.0) for name in names}
    for name, weight in weights.items():
        advice = f"leave a source out with members, or by ~dataset.sources.{name} on the command line"
        allowed = Allowed(f"a finite number above 0 ({advice})", lambda value: math.isfinite(value) and value > 0)
        check_value(f"the weight of source {name!r}", weight, allowed)
    return weights


def _counts(sizes: dict[str, int], weights: dict[str, float], num_questions: int | None) -> dict[str, int]:
    """Questions to draw from each source: the nearest whole numbers to the proportions, none above the size."""
    # Weights are compared by their decimals: 0.3 is three times 0.1.
    exact = {name: Fraction(str(weight)) for name, weight in (weights or sizes).items()}
    whole = sum(exact.values())
    most = math.floor(min(Fraction(size) / exact[name] for name, size in sizes.items()) * whole)
    words = (
        f"an integer in [1, {most}], as many as sources of {sizes} questions with weights {weights or 'by size'} give "
        "without repeating any, or None for the most"
    )
    check_value("num_questions", num_questions, Allowed(words, lambda n: n is None or (COUNT.test(n) and n <= most)))
    total = most if num_questions is None else num_questions
    quotas = {name: total * weight / whole for name, weight in exact.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _renamed(question: Question, source: str, dataset: str) -> Question:
    metadata = {"dataset": dataset, **question.metadata}
    return dataclasses.replace(question, id=f"{source}/{question.id}", metadata=metadata)


def _spread(parts: Sequence[Sequence[Question]]) -> list[Question]:
    """All questions, spread evenly: the i-th of n in a part stands at the fraction (i + 0.5) / n of the whole."""
    places = [
        ((number + 0.5) / len(part), source, number) for source, part in enumerate(parts) for number in range(len(part))
    ]
    return [parts[source][number] for _, source, number in sorted(places)]


def _corpus(config: MixtureConfig, parts: Sequence[QuestionSet]) -> Sequence[Passage] | None:
    if config.corpus is not None:
        return read_corpus(config.corpus)
    corpora: list[Sequence[Passage]] = []
    for part in parts:
        if part.corpus is not None and part.corpus not in corpora:
            corpora.append(part.corpus)
    return _joined(corpora) if len(corpora) > 1 else next(iter(corpora), None)


def _joined(corpora: Sequence[Sequence[Passage]]) -> Sequence[Passage]:
    """All passages, each once; the splits of a mixture get the same object, so that one retriever serves them."""
    key = tuple(map(id, corpora))
    if key not in _JOINED:
        passages: dict[str, Passage] = {}
        for passage in chain.from_iterable(corpora):
            if passages.setdefault(passage.id, passage).contents != passage.contents:
                raise ConfigurationError(
                    f"the sources of the mixture bring {len(corpora)} corpora, and id {passage.id!r} stands for "
                    "different passages in them, but a search goes over all; give corpus=... one file for all sources."
                )
        _JOINED[key] = corpora, list(passages.values())
    return _JOINED[key][1]
