"""Groups runs that differ only in the seed into methods, and gives the methods distinct names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from algorithms.analysis.comparison import published, statistics
from algorithms.analysis.comparison.statistics import Estimate
from algorithms.analysis.runs import ALL, Run

#: Settings in which the runs of a method may differ. Probes come after training and change no score.
_ALIKE = ("seed", "probes")


@dataclass(frozen=True)
class Method:
    """Runs of the same settings with one or more seeds.

    Attributes:
        label: Its name in every table and figure.
        base: The ablation or algorithm, without the other settings that distinguish the method.
        runs: One run per seed, sorted by seed.
    """

    label: str
    base: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int | None]:
        """Seeds of the runs."""
        return [run.seed for run in self.runs]

    def shares_seeds(self, other: Method) -> bool:
        """Whether each run of one has a run of the other with the same seed, so that they are compared seed by seed."""
        return self.seeds == other.seeds and len(set(self.seeds)) == len(self.seeds) and None not in self.seeds

    def means(self, mode: str, group: str, figure: str) -> np.ndarray:
        """A figure by seed, [runs]; runs without it are left out."""
        found = (run.figures(mode).get(group, {}).get(figure) for run in self.runs)
        return np.array([value for value in found if value is not None], dtype=float)

    def exact_match(self, mode: str, group: str = ALL, alike: Sequence[Method] = ()) -> Estimate:
        """Exact match with the 95 % interval of `statistics.crossed`.

        Args:
            mode: Mode of decoding.
            group: Group of questions.
            alike: Methods, this one among them, whose seeds are taken to vary equally; empty: this one alone tells.
        """
        by_seed, variance, count = self._spread(mode, group)
        others = [each.means(mode, group, "exact_match") for each in alike]
        return statistics.crossed(by_seed, variance, count, others)

    def _spread(self, mode: str, group: str) -> tuple[np.ndarray, float, int]:
        """Means by seed, the variance of their mean that comes from the questions, and the number of questions.

        Without predictions, the variance is that of a single seed, which is an upper bound.
        """
        by_seed, count = self.means(mode, group, "exact_match"), int(self.means(mode, group, "n")[0])
        right = answers(self.runs, mode, group)
        if right is None:
            return by_seed, float(np.mean(by_seed * (1 - by_seed))) / max(1, count - 1), count
        return by_seed, float(right.mean(axis=0).var(ddof=1)) / count if count > 1 else 0.0, count

    def macro_exact_match(self, mode: str, groups: Sequence[str]) -> Estimate:
        """Unweighted mean over groups of questions, with its interval."""
        means, variances, counts = zip(*(self._spread(mode, group) for group in groups), strict=True)
        return statistics.crossed(np.mean(means, axis=0), sum(variances) / len(groups) ** 2, sum(counts))


def answers(runs: Sequence[Run], mode: str, group: str = ALL) -> np.ndarray | None:
    """Right or wrong, [runs, questions] bool.

    None if a run lacks its predictions or answered other questions, or if the first does not name their groups.
    """
    outcomes = [run.outcomes.get(mode, {}) for run in runs]
    if any(found.keys() != outcomes[0].keys() for found in outcomes):
        return None
    members = [name for name in outcomes[0] if group in (ALL, runs[0].datasets.get(name))]
    return np.array([[found[name] for name in members] for found in outcomes]) if members else None


def without_copies(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split runs into those that count and copies. A copy has the method, the seed and all figures of another run."""
    seen: set[str] = set()
    kept: list[Run] = []
    copies: list[Run] = []
    for run in runs:
        key = repr((run.name, run.seed, _key(run, frozenset()), run.summary["evaluation"]))
        (copies if key in seen else kept).append(run)
        seen.add(key)
    return kept, copies


def make_methods(runs: Sequence[Run], ignore: Sequence[str] = ()) -> list[Method]:
    """Group finished runs.

    Args:
        runs: Runs with a summary.
        ignore: Dotted names of further settings in which the runs of a method may differ.

    Returns:
        Methods in the order of the paper's table, then by label; the runs of a method are sorted by seed.
    """
    ignored = frozenset(ignore).union(_ALIKE, *(run.settings_without_effect for run in runs))
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.name, _key(run, ignored)), []).append(run)
    methods = []
    for base in dict.fromkeys(name for name, _ in found):
        same = [members for (name, _), members in found.items() if name == base]
        for members, suffix in zip(same, _differences(same, ignored), strict=True):
            ordered = sorted(members, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
            methods.append(Method(f"{base} ({suffix})" if suffix else base, base, tuple(ordered)))
    return sorted(methods, key=lambda method: (_place(method.base), _natural(method.label)))


def _natural(label: str) -> list[tuple[float, str]]:
    """Sort key that puts 50 before 100."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [(float(part), "") if at % 2 else (float("inf"), part) for at, part in enumerate(parts)]


def _place(base: str) -> int:
    known = list(published.PUBLISHED)
    return known.index(base) if base in known else len(known)


def is_below(name: str, sections: Iterable[str]) -> bool:
    """Whether a dotted name is one of these, or of a setting inside of one of them."""
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def _relevant(run: Run, ignored: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if not is_below(name, ignored)}


def _key(run: Run, ignored: Set[str]) -> str:
    return repr(sorted((name, repr(value)) for name, value in _relevant(run, ignored).items()))


def _differences(groups: Sequence[Sequence[Run]], ignored: Set[str]) -> list[str]:
    """The settings that distinguish methods of one base; those of the command line if they suffice."""
    if len(groups) == 1:
        return [""]
    settings = [_relevant(members[0], ignored) for members in groups]
    names = [name for name in dict.fromkeys(name for each in settings for name in each) if _varies(name, settings)]
    values = {name: _without_common_folders([each.get(name) for each in settings]) for name in names}
    said = {
        override.lstrip("+~").partition("=")[0] for members in groups for run in members for override in run.overrides
    }
    for chosen in ([name for name in names if name in said], names):
        short = _short(chosen)
        suffixes = [", ".join(f"{short[name]}={values[name][at]}" for name in chosen) for at in range(len(groups))]
        if len(set(suffixes)) == len(suffixes):
            return suffixes
    return [f"{number}" for number in range(1, len(groups) + 1)]


def _varies(name: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    return len({repr(each.get(name, "absent")) for each in settings}) > 1


def _without_common_folders(values: Sequence[Any]) -> Sequence[Any]:
    """The values of a setting; if all are texts, without the folders that all of them begin with."""
    if not all(isinstance(value, str) for value in values):
        return values
    common = len(os.path.commonprefix(values).rpartition("/")[0])  # noqa: RUF071 (it is cut at a slash)
    return [value[common:].removeprefix("/") if common else value for value in values]


def _short(names: Sequence[str]) -> dict[str, str]:
    """The last part of a dotted name if no other name ends in it, else the whole name."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}
