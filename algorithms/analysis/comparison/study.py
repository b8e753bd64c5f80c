"""Makes a whole comparison from run directories and writes it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import file_name, write_whole
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.settings import COUNT, check_settings
from agentic_rag_env.terminal import printable
from algorithms.analysis.comparison import arc_panel, checks, curves, figures, pairwise, stability, style, tables
from algorithms.analysis.comparison.checks import Finding
from algorithms.analysis.comparison.methods import Method, make_methods, without_copies
from algorithms.analysis.comparison.page import Section, page
from algorithms.analysis.comparison.style import LIGHT, Drawing
from algorithms.analysis.comparison.table_formats import Table, as_markdown
from algorithms.analysis.comparison.tensorboard import write_board
from algorithms.analysis.runs import ALL, Run, find_runs, groups

TITLE = "Comparison of search agents"
_MARK = "comparison.json"
#: Further characters allowed in the names of tables and figures, for modes of decoding such as T=1.
_KEPT = "="
#: Files of each figure: for the screen, for the web, and for a paper.
_KINDS = ("png", "svg", "pdf")
_BANDS = (
    "Lines are means over seeds at steps of a stage that all have logged; bands reach from the lowest seed to the "
    "highest."
)
_BARS = "Bars are the 95 % intervals of the table of results."


@dataclass(frozen=True)
class Options:
    """Options of a comparison.

    Attributes:
        force: Go on although the runs are not comparable.
        with_paper: Show the paper's averages and the agreement of the orders.
        against: Label of the method that all others are compared with; None: all pairs.
        setting: Dotted names of settings; the score is plotted against the first one that a run has.
        resamples: Number of resamples of the bootstrap over seeds.
    """

    force: bool = False
    with_paper: bool = False
    against: str | None = None
    setting: tuple[str, ...] = ()
    resamples: int = 1000

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "resamples")


@dataclass
class Comparison:
    """Everything that a comparison shows.

    Attributes:
        runs: All runs that were found.
        methods: Methods, made from the finished runs.
        findings: Reasons for doubt.
        sections: Sections with tables and drawings, in their order.
    """

    runs: list[Run]
    methods: list[Method]
    findings: list[Finding]
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        return [table for section in self.sections for table in (*section.tables, *section.folded)]

    @property
    def drawings(self) -> list[Drawing]:
        """All drawings."""
        return [drawing for section in self.sections for drawing in section.drawings]


def compare(folders: Sequence[Path], out: Path, options: Options, terminal: Console | None = None) -> Comparison:
    """Read, check, compute, print and write.

    Raises:
        ConfigurationError: There is nothing to compare, the runs are not comparable, or `out` is not a comparison.
    """
    terminal = terminal or Console(width=None if Console().is_terminal else 160, markup=False, emoji=False)
    _check_out(out)
    found = study(folders, options)
    _check_study(out, found.runs)
    for finding in found.findings:
        terminal.print("NOT COMPARABLE:" if finding.refuses else "note:", style="yellow", end=" ")
        terminal.print(printable(finding.text, terminal.encoding), markup=False, highlight=False, soft_wrap=True)
    for table in found.tables:
        if table.printed:
            for block in table.rich(terminal):
                terminal.print(block)
    write(found, out)
    for line in (
        f"page:    {out / 'comparison.html'}",
        f"curves:  tensorboard --logdir {shlex.quote(str(out / 'tb'))}",
    ):
        terminal.print(line, soft_wrap=True, markup=False, highlight=False)
    return found


def study(folders: Sequence[Path], options: Options) -> Comparison:
    """Read, check and compute.

    Raises:
        ConfigurationError: There is nothing to compare, or the runs are not comparable.
    """
    runs = find_runs(folders)
    finished = [run for run in runs if run.missing is None]
    if not finished:
        raise ConfigurationError("No run is finished: " + "; ".join(f"{run.path}: {run.missing}" for run in runs))
    counted, copies = without_copies(finished)
    methods = make_methods(counted)
    labels = [method.label for method in methods]
    if options.against is not None and options.against not in labels:
        raise ConfigurationError(f"There is no method {options.against!r}.{did_you_mean(options.against, labels)}")
    findings = checks.check(methods)
    reasons = [finding.text for finding in findings if finding.refuses]
    if reasons and not options.force:
        told = "\n".join(f"  - {reason}" for reason in reasons)
        raise ConfigurationError(f"these runs are not comparable:\n{told}\nGive runs that agree, or --force to go on.")
    if left_out := [f"{run.path} ({run.missing})" for run in runs if run.missing]:
        findings.append(Finding(f"{len(left_out)} of {len(runs)} runs are left out: {'; '.join(left_out)}."))
    findings += [Finding(f"{run.path} repeats another run's seed and figures; counted once.") for run in copies]
    modes = [mode for mode in counted[0].modes if all(mode in run.modes for run in counted)]
    if not modes:
        raise ConfigurationError("No mode of decoding was evaluated in all of these runs, so there is nothing to show.")
    methods.sort(key=lambda method: -method.means(modes[0], ALL, "exact_match").mean())
    if (power := pairwise.told_power(methods, modes[0])) is not None:
        findings.append(Finding(power))
    return Comparison(runs, methods, findings, _sections(runs, methods, modes, options))


def _sections(runs: Sequence[Run], methods: Sequence[Method], modes: Sequence[str], options: Options) -> list[Section]:
    """Make all sections; the methods are in the order of their score."""
    looks = style.looks(methods)
    finished = [run for method in methods for run in method.runs]
    labels = [method.label for method in methods]
    shown, main = groups(finished), modes[0]
    found = {mode: pairwise.compare_pairs(methods, mode, options.against) for mode in modes}
    letters = {mode: pairwise.letters(labels, found[mode]) for mode in modes}
    results = [tables.results(methods, mode, shown, letters[mode], options.with_paper) for mode in modes]
    orders = [order for mode in modes if options.with_paper and (order := tables.order(methods, mode)) is not None]
    sections = [
        Section(
            "Results",
            [figures.scores(methods, mode, looks) for mode in modes],
            _first_printed(results),
            _first_printed(orders),
        )
    ]
    if len(methods) > 1:
        sections.append(
            Section(
                "Is the difference real?",
                [figures.differences(labels, found[mode], mode) for mode in modes if found[mode]],
                folded=_first_printed([pairwise.significance(found[mode], mode) for mode in modes]),
            )
        )
    if options.setting:
        sections.append(_setting_section(finished, modes, options.setting))
    if (panel := arc_panel.make_panel(methods)) is not None:
        short, whole = panel.shortened(), panel.table("arc-all", "All figures of the probes")
        whole.printed = False
        tables_of_probes = [short.weak_points(), short.table("arc", "ARC panel")]
        drawn = figures.probed(short)
        sections.append(Section("Where each is weak (ARC)", [drawn] if drawn else (), tables_of_probes, [whole]))
    steady = stability.table(methods)
    curves_shown = figures.learning_curves(methods, looks)
    sections.append(Section("Learning curves", curves_shown, [steady] if steady else (), note=_BANDS))
    cost = tables.costs(methods, main)
    sections.append(Section("Cost beside score", figures.cost_beside_score(methods, main, looks), [cost], note=_BARS))
    scored = {mode: tables.score_tables(methods, mode, shown) for mode in modes}
    profiles = [figures.profiles(scored[mode], mode, looks, options.resamples) for mode in modes]
    aggregates = [tables.aggregates(methods, mode, shown, options.resamples) for mode in modes]
    folded = [table for of_kind in zip(*aggregates, strict=True) for table in _first_printed(of_kind)]
    sections.append(Section("Aggregates over seeds", profiles, folded=folded))
    return [*sections, Section("Runs", (), [tables.found_runs(runs, methods, main)])]


def _first_printed(of_modes: Sequence[Table]) -> Sequence[Table]:
    """Make the same table for several modes of decoding; the terminal shows only the first."""
    for table in of_modes[1:]:
        table.printed = False
    return of_modes


def _setting_section(runs: Sequence[Run], modes: Sequence[str], names: tuple[str, ...]) -> Section:
    lines = {mode: curves.score_by_setting(runs, names, mode) for mode in modes}
    first = lines[modes[0]]
    if not first:
        known = {name for run in runs for name, value in run.settings.items() if isinstance(value, (int, float))}
        raise ConfigurationError(f"No run has a numeric setting {' or '.join(names)}.{did_you_mean(names[0], known)}")
    of_lines = style.looks([Method(line.label, line.base, ()) for line in first])
    used = next(name for name in names if any(name in run.settings for run in runs))
    words = used.rpartition(".")[2].replace("_", " ")
    return Section(
        f"Score by {words}",
        [figures.by_setting(lines[mode], words, mode, of_lines) for mode in modes],
        [curves.setting_table(lines[mode], words, names, mode) for mode in modes],
        note=f"Large marks are means, small dots are seeds, and bars are intervals. {curves.POOLED}",
    )


def _check_out(out: Path) -> None:
    """Refuse a folder that holds anything but a comparison."""
    if (out / "summary.json").exists() or (out / "metrics.jsonl").exists():
        raise ConfigurationError(f"{out} is a run directory; choose another folder for the comparison (--out).")
    if any((out / name).is_symlink() for name in ("tb", "figures")):
        raise ConfigurationError(f"{out} holds links that lead elsewhere; choose another folder (--out).")
    if (out / "tb").exists() and not (out / _MARK).exists():
        raise ConfigurationError(f"{out} holds a tb/ that is not of a comparison; choose another folder (--out).")


def _check_study(out: Path, runs: Sequence[Run]) -> None:
    """Refuse a folder that holds a comparison of runs of which this one has none."""
    earlier = _mark(out).get("runs")
    if isinstance(earlier, list) and earlier and not {str(run.path.resolve()) for run in runs} & set(map(str, earlier)):
        raise ConfigurationError(
            f"{out} holds the comparison of other runs, such as {printable(str(earlier[0]))}; choose another folder "
            "(--out), or remove that one."
        )


def _mark(out: Path) -> dict[str, Any]:
    """What an earlier comparison noted; empty without one. It may be a stranger's."""
    with suppress(OSError, ValueError, RecursionError):
        if isinstance(noted := json.loads((out / _MARK).read_text(encoding="utf-8")), dict):
            return noted
    return {}


def subtitle(methods: Sequence[Method]) -> str:
    """Data, date and code of a comparison in one line, as far as the runs tell."""
    runs = [run for method in methods for run in method.runs]
    data = {run.data for run in runs}
    counts = {run.figures(run.modes[0])[ALL]["n"] for run in runs}
    dates = sorted(str(date)[:10] for run in runs if (date := run.summary.get("date")))
    commits = {str(commit) for run in runs if (commit := run.summary.get("commit"))}
    told = [
        f"Data: {', '.join(sorted(data))}, {' or '.join(f'{count:,}' for count in sorted(counts))} test questions",
        f"{len(runs)} runs of {len(methods)} methods",
    ]
    told += [f"measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"] if dates else []
    told += [f"commit {', '.join(sorted(commits))}"] if commits else []
    return "; ".join(told) + "."


def _remove_earlier(out: Path) -> None:
    """Remove the files of an earlier comparison, so that none is taken for a part of this one."""
    files = _mark(out).get("files")
    for name in files if isinstance(files, list) else ():
        if _is_ours(name):
            (out / name).unlink(missing_ok=True)


def _is_ours(name: Any) -> bool:
    """Whether `write` can have chosen a name in an earlier comparison's mark, which may be a stranger's."""
    parts = Path(name).parts if isinstance(name, str) else ()
    return len(parts) in (1, 2) and all(file_name(part, _KEPT) == part for part in parts)


def write(found: Comparison, out: Path) -> None:
    """Write every file of a comparison; those of an earlier one are removed when all are made."""
    told = "".join(
        f"- {'**Not comparable:** ' if each.refuses else ''}{as_markdown(each.text)}\n" for each in found.findings
    )
    head = f"# {TITLE}\n\n{as_markdown(subtitle(found.methods))}\n\n" + (f"{told}\n" if told else "")
    text = head + "\n".join(table.markdown() for table in found.tables)
    files = {"comparison.md": text, "curves.csv": curves.curves_csv(found.methods)}
    for table in found.tables:
        name = file_name(table.name, _KEPT)
        files |= {f"{name}.csv": table.csv(), f"{name}.tex": table.latex()}
    content: dict[str, Any] = {
        "findings": [{"text": finding.text, "refuses": finding.refuses} for finding in found.findings],
        "tables": {table.name: table.records() for table in found.tables},
    }
    images = {
        f"{file_name(drawing.name, _KEPT)}.{kind}": file
        for drawing in found.drawings
        for kind, file in style.render(drawing, _KINDS, LIGHT, with_legend=True).items()
    }
    content["runs"] = sorted(str(run.path.resolve()) for run in found.runs)
    content["files"] = [*files, "comparison.html", *(f"figures/{name}" for name in images)]
    files["comparison.html"] = page(TITLE, found.sections, found.findings, subtitle(found.methods))
    files[_MARK] = json.dumps(content, indent=2, ensure_ascii=False)
    _remove_earlier(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        write_whole(out / name, written.encode())
    for name, image in images.items():
        write_whole(out / "figures" / name, image)
    shutil.rmtree(out / "tb", ignore_errors=True)
    shown = {name.removesuffix(".png"): image for name, image in images.items() if name.endswith(".png")}
    write_board(out / "tb", found.methods, shown)
