"""Probes of searching, computed from ordinary episodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from agentic_rag_env.answers import holds_answer, normalize_answer
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes.figures import Best, Figures
from agentic_rag_env.probes.gold import Gold, titles
from agentic_rag_env.probes.material import EpisodeInfos, Material, executed_searches, of_search, worked
from agentic_rag_env.registry import PROBES
from agentic_rag_env.types import Passage, Question


@PROBES.register("query_rewriting")
@of_search
def query_rewriting(material: Material) -> Figures:
    """Query rewriting: whether the queries find what the question asks for.

    A round is an executed search, and brings at most k = `top_k` passages. A round hits if one of its passages, title
    included, holds a golden answer as whole words after normalization. The figures are over the episodes i = 1..n whose
    searches worked. An episode without an executed search is a miss.

    | figure | formula |
    | --- | --- |
    | `hit_first_round` | share of i whose first round hits (hit@k, round 1) |
    | `hit_any_round` | share of i with a round that hits (hit@k, any round) |
    | `hit_verbatim` | share of i that would hit with the question itself as the query; needs a retriever |
    | `gain_over_verbatim` | mean_i (first round hits - verbatim hits), paired; needs a retriever |
    | `query_copied` | share of i whose first executed query is the question, both normalized |
    | `title_recall` | mean_i (gold titles among those found in any round / gold titles), over i with known titles |
    | `passage_recall` | the same with the gold passages themselves, by id or title and text, over i with known ids |
    | `without_gold` | share of i for which neither titles nor ids are known |
    | `search_failed` | share of all episodes whose search failed, which are no i; left out if there is none |

    Args:
        material: The material, which needs `episodes`.
    """
    numbers, episodes = _episodes(material)
    figures = material.search_failed(numbers, len(material.questions))
    if not numbers:
        return figures
    questions = [material.questions[number] for number in numbers]
    rounds = [[info["passages"][: material.top_k] for info in executed_searches(episode)] for episode in episodes]
    answers = [question.golden_answers for question in questions]
    hits = [[_hits(found, golden) for found in of_episode] for of_episode, golden in zip(rounds, answers, strict=True)]
    first = np.array([any(of_episode[:1]) for of_episode in hits], dtype=float)
    figures |= {
        "hit_first_round": material.share(first, "high"),
        "hit_any_round": material.share([any(of_episode) for of_episode in hits], "high"),
        "query_copied": material.share(list(map(_copied, episodes, questions)), "low"),
    }
    found = material.found_verbatim
    places = [place for place, number in enumerate(numbers) if number in found]
    if verbatim := [_hits(found[numbers[place]][: material.top_k], answers[place]) for place in places]:
        hits_verbatim = np.array(verbatim, dtype=float)
        figures["hit_verbatim"] = material.share(hits_verbatim)
        figures["gain_over_verbatim"] = material.figure(first[places] - hits_verbatim, "high")
    return figures | _recalls(material, [material.gold[number] for number in numbers], rounds)


@PROBES.register("search_behaviour")
@of_search
def search_behaviour(material: Material) -> Figures:
    """Search behaviour: how often the agent searches, and whether it stops at the right time.

    The figures are over the episodes i = 1..n whose searches worked. Only executed searches count, so a search in the
    final turn does not.

    | figure | formula |
    | --- | --- |
    | `num_searches` | mean_i searches_i |
    | `searches_<j>` | share of i with exactly j searches, for j = 0, 1, ... up to the most in any episode |
    | `malformed_fraction` | sum_i malformed turns / sum_i turns |
    | `repeated_query` | share of i in which a search repeats an earlier query, both normalized |
    | `unanswered` | share of i that end without an answer |
    | `without_gold` | share of i whose evidence is not known |
    | `search_failed` | share of all episodes whose search failed, which are no i; left out if there is none |

    The following figures are over those i whose evidence is known: ids of gold passages or, where these are not known,
    their titles. Evidence is seen once a search has found it, under its id or with its title and text.

    | figure | formula |
    | --- | --- |
    | `evidence_complete` | share of i that see all of the evidence |
    | `stopped_too_early` | share of i that answer wrongly before any of it is seen |
    | `stopped_midway` | share of i that answer wrongly when some of it, but not all, is seen |
    | `searched_on` | share of i that search again after all of it is seen: stopped too late |
    | `extra_searches` | mean_i (searches_i - pieces of evidence_i); below 0: fewer searches than hops |

    Args:
        material: The material, which needs `episodes`.
    """
    numbers, episodes = _episodes(material)
    figures = material.search_failed(numbers, len(material.questions))
    if not numbers:
        return figures
    counts = np.array([_num_searches(episode) for episode in episodes])
    malformed = [sum(info["action"] == "malformed" for info in episode) for episode in episodes]
    figures["num_searches"] = material.figure(counts)
    figures |= {f"searches_{j}": material.share(counts == j) for j in range(int(counts.max()) + 1)}
    figures["malformed_fraction"] = material.share(malformed, "low", weights=list(map(len, episodes)))
    figures["repeated_query"] = material.share([_repeats(episode) for episode in episodes], "low")
    figures["unanswered"] = material.share([episode[-1]["action"] != "answer" for episode in episodes], "low")
    return figures | _stopping(material, [material.gold[number] for number in numbers], episodes)


#: The ways in which an episode may stop searching, and which way each share is good.
_STOPPING: tuple[tuple[str, Best], ...] = (
    ("evidence_complete", "high"),
    ("stopped_too_early", "low"),
    ("stopped_midway", "low"),
    ("searched_on", "low"),
)


def _stopping(material: Material, of_gold: Sequence[Gold], episodes: Sequence[EpisodeInfos]) -> Figures:
    rows = []
    for gold, episode in zip(of_gold, episodes, strict=True):
        if not gold.pieces:
            continue
        seen: frozenset[str] = frozenset()
        searched_on = False
        for info in executed_searches(episode):
            searched_on |= len(seen) >= gold.num_needed
            seen |= gold.found_in(info["passages"])
        wrong = episode[-1]["action"] == "answer" and not episode[-1]["correct"]
        complete = len(seen) >= gold.num_needed
        extra = _num_searches(episode) - gold.num_needed
        rows.append((complete, wrong and not seen, wrong and bool(seen) and not complete, searched_on, extra))
    figures: Figures = {}
    if rows:
        *of_shares, extra_searches = zip(*rows, strict=True)
        for (name, best), values in zip(_STOPPING, of_shares, strict=True):
            figures[name] = material.share(values, best)
        figures["extra_searches"] = material.figure(extra_searches)
    figures["without_gold"] = material.share([not gold.pieces for gold in of_gold])
    return figures


def _recalls(material: Material, of_gold: Sequence[Gold], rounds: Sequence[Sequence[Sequence[Passage]]]) -> Figures:
    by_title, by_id = [], []
    for gold, of_episode in zip(of_gold, rounds, strict=True):
        passages = [passage for found in of_episode for passage in found]
        if gold.titles:
            by_title.append(gold.share(len(gold.titles & titles(passages)), len(gold.titles)))
        if gold.ids:
            by_id.append(gold.share(len(gold.found_in(passages)), len(gold.ids)))
    recalls = {"title_recall": by_title, "passage_recall": by_id}
    figures = {name: material.share(values, "high") for name, values in recalls.items() if values}
    return figures | {"without_gold": material.share([not gold.pieces for gold in of_gold])}


def _episodes(material: Material) -> tuple[list[int], list[EpisodeInfos]]:
    """The numbers of the questions whose searches worked, and their episodes."""
    if material.episodes is None:
        raise ConfigurationError(
            "This probe looks at episodes, and the material has none; make some with probes.play, or leave it out."
        )
    if len(material.episodes) != len(material.questions) or not all(material.episodes):
        raise ConfigurationError(
            f"There must be an episode of at least one step for each question, got {len(material.episodes)} episodes "
            f"for {len(material.questions)} questions."
        )
    for episode, question in zip(material.episodes, material.questions, strict=True):
        if episode[0]["question_id"] != question.id:
            raise ConfigurationError(
                f"Episodes must be in the order of the questions, but that of {episode[0]['question_id']!r} stands in "
                f"the place of {question.id!r}."
            )
    numbers = worked(material.episodes)
    return numbers, [material.episodes[number] for number in numbers]


def _num_searches(episode: EpisodeInfos) -> int:
    return episode[-1]["num_searches"]


def _hits(passages: Iterable[Passage], golden_answers: Iterable[str]) -> bool:
    return any(holds_answer(passage.contents, golden_answers) for passage in passages)


def _copied(episode: EpisodeInfos, question: Question) -> bool:
    first = next(executed_searches(episode), None)
    return first is not None and normalize_answer(first["query"] or "") == normalize_answer(question.text)


def _repeats(episode: EpisodeInfos) -> bool:
    queries = [normalize_answer(info["query"] or "") for info in executed_searches(episode)]
    return len(set(queries)) < len(queries)
