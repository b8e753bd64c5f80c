"""Tests whether methods differ: every pair on the same questions, corrected for the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from algorithms.analysis.comparison import published, statistics
from algorithms.analysis.comparison.methods import Method, answers
from algorithms.analysis.comparison.statistics import Paired, Power
from algorithms.analysis.comparison.table_formats import Cell, Number, Table

SIGNIFICANT = 0.05
#: With more pairs, the terminal shows only the letters in the table of results.
_PRINTED_PAIRS = 10


class Pair(NamedTuple):
    """Labels of two methods and their comparison on the same questions."""

    first: str
    second: str
    found: Paired


def compare_pairs(methods: Sequence[Method], mode: str, against: str | None = None) -> list[Pair]:
    """Compare every pair of methods that answered the same questions.

    Args:
        methods: All methods.
        mode: Mode of decoding.
        against: Label of the one method that all others are compared with; None: all pairs.
    """
    pairs = []
    for first, second in combinations(methods, 2):
        if against in (None, first.label, second.label):
            one, other = (second, first) if second.label == against else (first, second)
            right = answers([*one.runs, *other.runs], mode)
            if right is not None:
                found = statistics.paired(*_split(right, one), by_seed=one.shares_seeds(other))
                pairs.append(Pair(one.label, other.label, found))
    return pairs


def told_power(methods: Sequence[Method], mode: str) -> str | None:
    """Say which differences these runs can detect, and how many seeds the paper's would take.

    Returns:
        None where no pair of methods tells it: they have single seeds, a single question, or answers without variance.
    """
    found: list[tuple[Power, float]] = []
    for first, second in combinations([method for method in methods if len(method.runs) > 1], 2):
        right = answers([*first.runs, *second.runs], mode)
        if right is not None and right.shape[1] > 1:
            power = Power(*_split(right, first), by_seed=first.shares_seeds(second))
            if detectable := power.detectable():
                found.append((power, detectable))
    if not found:
        return None
    seen = float(np.median([detectable for _, detectable in found]))
    told = (
        f"these runs can tell apart differences of {seen:.3f}, {mode}"
        if seen < 1
        else f"these runs can't tell any difference apart, {mode}, not even one of 1"
    )
    return (
        f"{told} (median over {len(found)} pairs; found in four of five cases at the 5 % level, before correction); "
        f"{_told_seeds([power for power, _ in found])}."
    )


def _told_seeds(found: Sequence[Power]) -> str:
    """How many seeds the paper's difference would take, by the pairs whose seeds show how far seeds differ."""
    paper = f"the paper's {published.GUIDANCE:.3f} of the teacher's guidance"
    needed = sorted(power.seeds_for(published.GUIDANCE) or np.inf for power in found if power.num_seeds > 2)
    if not needed:
        return f"two seeds can't tell how many seeds {paper} would take"
    middle = needed[len(needed) // 2]
    enough = f"{middle} seeds a method" if middle < np.inf else "more questions, whatever the number of seeds"
    return f"{paper} would take {enough}"


def _split(right: np.ndarray, first: Method) -> tuple[np.ndarray, np.ndarray]:
    return right[: len(first.runs)], right[len(first.runs) :]


class Verdict(NamedTuple):
    """Corrected p-values of a pair, and the conclusion that they allow.

    Attributes:
        p_questions: As in `Paired`, after Holm's correction.
        p_methods: As in `Paired`, after Holm's correction; None if one of the two has one seed.
        words: The conclusion at the 5 % level.
        sign: "*" if the methods differ, "°" if at least these policies do.
    """

    p_questions: float
    p_methods: float | None
    words: str
    sign: str

    @property
    def differ(self) -> bool:
        """Whether the two differ: over seeds if both have several, else over questions."""
        return (self.p_questions if self.p_methods is None else self.p_methods) < SIGNIFICANT


def judge(pairs: Sequence[Pair]) -> list[Verdict]:
    """Correct for the number of pairs, separately for each of the two p-values."""
    by_question = statistics.holm([pair.found.p_questions for pair in pairs])
    with_seeds = {at: pair.found.p_methods for at, pair in enumerate(pairs) if pair.found.p_methods is not None}
    by_method = dict(zip(with_seeds, statistics.holm(list(with_seeds.values())), strict=True))
    return [_verdict(p_questions, by_method.get(at)) for at, p_questions in enumerate(by_question)]


def significance(pairs: Sequence[Pair], mode: str) -> Table:
    """Make the table of pairs on the same questions, corrected for their number."""
    rows: list[list[Cell]] = []
    for (first, second, found), verdict in zip(pairs, judge(pairs), strict=True):
        p_values = found.p_questions, verdict.p_questions, found.p_methods, verdict.p_methods
        cells = [Number(p_value, style="p") for p_value in p_values]
        rows.append([first, second, Number.of(found.difference, "+.3f"), *cells, verdict.words])
    note = (
        "Exact match of the first minus the second, with its 95 % interval over seeds and questions (over questions "
        "alone where a method has one seed). p, policies: exact paired permutation test over questions, whether these "
        "trained policies differ; McNemar's for one seed each. p, methods: t test over seeds and questions, whether "
        f"other seeds would differ too. Corrected after Holm for the {len(rows)} pairs of this table; a pair without "
        "the same questions or without predictions is left out. Methods with the same seeds are compared seed by seed, "
        "others as independent. With few seeds only large differences between methods show; --against METHOD tests "
        "fewer pairs, and so corrects less."
    )
    columns = ["first", "second", "difference", "p, policies", "corrected, policies", "p, methods",
               "corrected, methods", "at the 5 % level"]  # fmt: skip
    title = f"Paired comparisons, {mode}"
    return Table(f"significance-{mode}", title, columns, rows, note, printed=len(rows) <= _PRINTED_PAIRS)


def letters(labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, str]:
    """Make the compact display of all pairs: methods that share a letter are not told apart.

    The method is that of Piepho, "An algorithm for a letter-based representation of all-pairwise comparisons", 2004.

    Args:
        labels: Labels of the methods; the first gets the first letter.
        pairs: The result of `compare_pairs`.

    Returns:
        Empty if a pair was not compared, since a letter would say of it what nobody has tested; and without pairs.
    """
    if not pairs or len(pairs) < len(labels) * (len(labels) - 1) // 2:
        return {}
    alike = {frozenset(labels)}
    for pair, verdict in zip(pairs, judge(pairs), strict=True):
        if verdict.differ:
            both = {pair.first, pair.second}
            parts = {group - {one} for group in alike if both <= group for one in both}
            parts |= {group for group in alike if not both <= group}
            alike = {part for part in parts if not any(part < other for other in parts)}
    ordered = sorted(alike, key=lambda group: [label not in group for label in labels])
    names = [ascii_lowercase[at % 26] + "'" * (at // 26) for at in range(len(ordered))]
    return {
        label: "".join(name for name, group in zip(names, ordered, strict=True) if label in group) for label in labels
    }


def _verdict(p_questions: float, p_methods: float | None) -> Verdict:
    if p_methods is not None and p_methods < SIGNIFICANT:
        return Verdict(p_questions, p_methods, "methods differ", "*")
    if p_questions < SIGNIFICANT:
        words = "these policies differ" + ("; one seed can't tell about methods" if p_methods is None else "")
        return Verdict(p_questions, p_methods, words, "°")
    return Verdict(p_questions, p_methods, "not told apart", "")
