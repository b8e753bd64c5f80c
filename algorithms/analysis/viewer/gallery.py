"""Chooses the trajectories to show: files of one or more runs, the same question side by side, and filters."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import read_rows
from algorithms.analysis.runs import Run, find_runs
from algorithms.analysis.viewer.episodes import Episode, read_episodes

_TOLD = ("golden_answers", "dataset")
_SUFFIX = ".jsonl.gz"
_OF_STEP = re.compile(r"(?P<split>.+)-(?P<step>\d{6,})")
_OF_MODEL = re.compile(r"(?P<split>[^-]+)-(?P<model>.+)-(?P<mode>greedy|T=.+)")


@dataclass(frozen=True)
class Wanted:
    """What to look at; None means anything.

    Attributes:
        files: Names or patterns of files in `trajectories/`. With them, split, models, mode and step are ignored.
        split: "train", "dev", "test", ...
        models: Models to show side by side, named as in files and tables.
        mode: Mode of decoding: "greedy", "T=1", ...
        step: Training step.
        verdict: "right" or "wrong"; everything but right is wrong.
        ending: Why the episode is over, a value of `Ending`.
        group: Group of questions, by its name or its number of hops.
        malformed: Only episodes with a malformed turn.
        searches: Number of executed searches.
        text: Text that the question, the answers or the model's words contain.
    """

    files: Sequence[str] = ()
    split: str | None = None
    models: Sequence[str] = ()
    mode: str | None = None
    step: int | None = None
    verdict: str | None = None
    ending: str | None = None
    group: str | None = None
    malformed: bool = False
    searches: int | None = None
    text: str | None = None

    @property
    def says_no_file(self) -> bool:
        """Whether no field chooses files."""
        return not (self.files or self.split or self.models or self.mode) and self.step is None

    def keeps(self, episode: Episode | None) -> bool:
        """Whether an episode passes all filters."""
        return episode is not None and (
            (self.verdict is None or episode.correct == (self.verdict == "right"))
            and (self.ending is None or episode.ending == self.ending)
            and (self.group is None or self.group in (episode.group, str(episode.hops)))
            and (not self.malformed or episode.num_malformed > 0)
            and (self.searches is None or episode.num_searches == self.searches)
            and (self.text is None or episode.holds(self.text))
        )


@dataclass(frozen=True)
class Item:
    """A question with its episodes in several columns.

    Attributes:
        split: Split of the question.
        step: Training step at which it was played; None at the end.
        episodes: Episode by column of the gallery; None if the question was not played there.
    """

    split: str
    step: int | None
    episodes: Sequence[Episode | None]

    @property
    def place(self) -> str:
        """Split and step in words."""
        return self.split if self.step is None else f"{self.split}, step {self.step}"

    @property
    def first(self) -> Episode:
        """The leftmost episode."""
        return next(episode for episode in self.episodes if episode is not None)


@dataclass(frozen=True)
class Column:
    """One model of one run.

    Attributes:
        run: Index of the run.
        name: Name of the run, if there are several.
        measured: Model and mode of decoding of the final figures; None if there are none.
    """

    run: int
    name: str
    measured: str | None

    def label(self, step: int | None = None) -> str:
        """Heading of an episode that was played at the end or at a training step."""
        who = self.measured if step is None else None
        return ": ".join(filter(None, (self.name, who or "in training")))


@dataclass(frozen=True)
class Gallery:
    """Episodes in rows and columns.

    Attributes:
        columns: The models, side by side.
        items: The rows, one for each question.
        runs: The runs that they come from.
    """

    columns: Sequence[Column]
    items: Sequence[Item]
    runs: Sequence[Run]


@dataclass(frozen=True)
class _File:
    path: Path
    split: str
    model: str | None = None
    mode: str | None = None
    step: int | None = None

    @property
    def measured(self) -> str | None:
        return f"{self.model}, {self.mode}" if self.model else None


def gather(folders: Sequence[Path], wanted: Wanted) -> Gallery:
    """Read the wanted episodes of some runs.

    By default these are the trained model's greedy episodes on the test questions and the samples of training. For an
    unfinished run they are all that it has saved.

    Args:
        folders: Run directories.
        wanted: Which files, and which episodes in them.

    Raises:
        ConfigurationError: A folder is not a run, or holds no wanted episode.
        DataError: A file is damaged.
    """
    runs = [_run(folder) for folder in folders]
    columns: list[Column] = []
    rows: dict[tuple[str, int | None, str, int], dict[Column, Episode]] = {}
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        chosen = _choose(run, wanted)
        measured: Iterable[str | None] = dict.fromkeys(file.measured for file in chosen if file.measured) or [None]
        of_run = [Column(number, name, each) for each in measured]
        for file in chosen:
            # Episodes that were played during training stand in the run's first column.
            column = next((each for each in of_run if each.measured == file.measured), of_run[0])
            run.check(file.path)
            for occurrence, episode in _numbered(read_episodes(file.path, _answers(file.path))):
                rows.setdefault((file.split, file.step, episode.question_id, occurrence), {})[column] = episode
        columns += of_run
    items = (Item(split, step, tuple(map(row.get, columns))) for (split, step, *_), row in rows.items())
    return Gallery(columns, [item for item in items if any(map(wanted.keeps, item.episodes))], runs)


def _numbered(episodes: Iterable[Episode]) -> Iterator[tuple[int, Episode]]:
    """How often the question of an episode occurred before it."""
    seen: Counter[str] = Counter()
    for episode in episodes:
        yield seen[episode.question_id], episode
        seen[episode.question_id] += 1


def _run(folder: Path) -> Run:
    found = find_runs([folder])
    here = [run for run in found if run.path.resolve() == folder.expanduser().resolve()] or found
    if len(here) > 1:
        listed = ", ".join(str(run.path) for run in here[:8]) + (", ..." if len(here) > 8 else "")
        raise ConfigurationError(f"{folder} holds {len(here)} runs; name the one to look at: {listed}")
    return here[0]


def _choose(run: Run, wanted: Wanted) -> list[_File]:
    """The wanted files of a run, in the order of their names."""
    paths = sorted((run.path / "trajectories").glob(f"*{_SUFFIX}"))
    if not paths:
        raise ConfigurationError(
            f"{run.path} has no trajectories/*{_SUFFIX} yet: a run writes them at each check on the dev split "
            "(evaluation.every) and at its end."
        )
    files = [_parse(path) for path in paths]
    chosen = _named(files, wanted.files) if wanted.files else _described(files, run, wanted)
    if not chosen and wanted.says_no_file:
        chosen = files
    if not chosen:
        listed = ", ".join(path.name.removesuffix(_SUFFIX) for path in paths)
        raise ConfigurationError(f"{run.path / 'trajectories'} holds nothing of that kind; there are: {listed}")
    return chosen


def _named(files: Sequence[_File], patterns: Sequence[str]) -> list[_File]:
    wanted = [pattern.removesuffix(_SUFFIX) for pattern in patterns]
    return [file for file in files if any(fnmatch(file.path.name.removesuffix(_SUFFIX), each) for each in wanted)]


def _described(files: Sequence[_File], run: Run, wanted: Wanted) -> list[_File]:
    """Files of the wanted split, model, mode and step; a missing choice is taken from the final figures."""
    if wanted.step is not None:
        return [file for file in files if file.step == wanted.step and wanted.split in (None, file.split)]
    modes = sorted(dict.fromkeys(file.mode for file in files if file.mode), key=lambda mode: mode != "greedy")
    models = wanted.models or ([] if run.missing else [run.final])
    measured = [
        file
        for file in files
        if file.step is None
        and file.split == (wanted.split or run.summary.get("split", "test"))
        and file.mode in ([wanted.mode] if wanted.mode else modes[:1])
        and (not models or file.model in models)
    ]
    if wanted.models or wanted.mode:
        return measured
    return measured + [file for file in files if file.step is not None and file.split == (wanted.split or "train")]


def _parse(path: Path) -> _File:
    stem = path.name.removesuffix(_SUFFIX)
    if match := _OF_STEP.fullmatch(stem):
        return _File(path, match["split"], step=int(match["step"]))
    if match := _OF_MODEL.fullmatch(stem):
        return _File(path, match["split"], match["model"], match["mode"])
    return _File(path, stem)


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart: none for one run, else their own names, seeds or paths."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) == 1:
        return [""] * len(runs)
    common = os.path.commonpath([path.parent for path in paths])
    ways = (
        [run.name for run in runs],
        [f"{run.name}, seed {run.seed}" for run in runs],
        [str(path.relative_to(common)) for path in paths],
    )
    return next((names for names in ways if len(set(names)) == len(names)), ways[-1])


def _answers(path: Path) -> dict[str, Mapping[str, Any]]:
    """Golden answers and group by question, from the predictions of the same model on the same questions."""
    file = path.parent.parent / "predictions" / path.name.removesuffix(".gz")
    if not file.is_file():
        return {}
    return dict(read_rows(file, lambda row: (row["question_id"], {name: row[name] for name in _TOLD})))
