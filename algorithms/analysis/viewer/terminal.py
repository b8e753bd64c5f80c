"""Shows trajectories in a terminal: one question at a time, with the text read and written in every turn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from agentic_rag_env.terminal import printable
from agentic_rag_env.types import Passage
from algorithms.analysis.viewer.episodes import FIGURES, Episode, Turn, find_answers
from algorithms.analysis.viewer.gallery import Gallery, Item
from algorithms.analysis.viewer.shading import Split, scales

KEYS = """\
n: next   p: previous   12: the twelfth   /words: the next one with these words   q: leave
r: next right   w: next wrong   m: next with a malformed turn   (with several columns: right or wrong in any)
Enter: the last of n, p, /words, r, w and m again; n at the beginning, and after a number or a key that led nowhere
"""

_WARM, _COOL = (213, 94, 0), (86, 180, 233)
_PARTS = re.compile(r"<(think|search|answer)>(.*?)(?:</\1>|$)", re.DOTALL)
_PART_STYLES = {"think": "italic dim", "search": "bold cyan", "answer": "bold magenta"}


class Printer:
    """Prints the items of a gallery.

    Args:
        gallery: Gallery to print.
        console: Console to print on.
        shade: A name in `FIGURES` whose values colour the tokens; None for no colours.
        splits: Splits the turns of each column into tokens; read only with `shade`.
    """

    def __init__(
        self, gallery: Gallery, console: Console, shade: str | None = None, splits: Sequence[Split] = ()
    ) -> None:
        self._gallery, self._console, self._shade, self._splits = gallery, console, shade, splits
        self._full = scales(gallery).get(shade, 1.0) if shade else 1.0

    def item(self, number: int) -> None:
        """Print an item, counted from 0, in every column."""
        item = self._gallery.items[number]
        first = item.first
        hops = f"{first.hops} {'hop' if first.hops == 1 else 'hops'}" if first.hops else None
        about = " · ".join(filter(None, (item.place, first.group, hops, first.question_id)))
        self._console.rule(self._text(f"{number + 1} of {len(self._gallery.items)} · {about}", "dim"))
        self._line(f"Question: {first.question}", "bold")
        if first.golden_answers:
            self._line(f"Golden answer: {' / '.join(first.golden_answers)}", "green")
        for column, episode in enumerate(item.episodes):
            self._line("")
            if len(item.episodes) > 1:
                self._line(f"[{self._gallery.columns[column].label(item.step)}]", "bold underline")
            if episode is None:
                self._line("not played", "dim")
            else:
                self._episode(episode, column)
        self._line("")

    def legend(self) -> None:
        """Say what the colours mean."""
        if self._shade:
            ends = "orange below, blue above 0" if self._shade == "advantages" else "orange"
            self._line(f"Shaded by {FIGURES[self._shade]}: {ends}, full from {self._full:.3g} on.", "dim")

    def _episode(self, episode: Episode, column: int) -> None:
        facts = [
            None if episode.answer is None else f"answer: {episode.answer or '(empty)'}",
            f"F1 {episode.f1:.2f}",
            f"reward {episode.reward:.3g}",
            f"{episode.num_searches} {'search' if episode.num_searches == 1 else 'searches'}",
            f"{episode.num_tokens} tokens",
            f"{episode.num_malformed} malformed" if episode.num_malformed else None,
            f"written by the {episode.source}" if episode.source != "policy" else None,
        ]
        verdict = self._text(episode.verdict.upper(), "bold green" if episode.correct else "bold red")
        self._console.print(Text.assemble(verdict, self._text(" · " + " · ".join(filter(None, facts)))))
        for number, turn in enumerate(episode.turns, 1):
            title = " · ".join(filter(None, (f"Turn {number}", (turn.action or "").upper(), turn.problem)))
            style = "bold yellow" if turn.problem or turn.action == "malformed" else "bold"
            self._line(title, style)
            self._indented(self._said(turn, column))
            for rank, passage in enumerate(turn.passages, 1):
                self._indented(self._passage(rank, passage, episode.golden_answers))
            if turn.reply:
                self._indented(self._text(f"read: {turn.reply.strip()}", "dim"))

    def _said(self, turn: Turn, column: int) -> Text:
        said = Text()
        values = turn.figures.get(self._shade) if self._shade else None
        parts = self._splits[column](turn) if values is not None else None
        if parts is None or values is None:
            start = 0
            for match in _PARTS.finditer(turn.text):
                said += self._text(turn.text[start : match.start()])
                said += self._text(match[0], _PART_STYLES[match[1]])
                start = match.end()
            return said + self._text(turn.text[start:])
        for part, value in zip(parts, values, strict=True):
            said += self._text(part, self._colour(value))
        return said

    def _colour(self, value: float) -> str:
        heat = min(1.0, abs(value) / self._full)
        if math.isnan(heat) or heat < 0.02:
            return ""
        hue = _COOL if self._shade == "advantages" and value > 0 else _WARM
        red, green, blue = (round(255 + heat * (to - 255)) for to in hue)
        return f"black on rgb({red},{green},{blue})"

    def _passage(self, rank: int, passage: Passage, golden: Sequence[str]) -> Text:
        text = passage.contents.replace("\n", ": ", 1)
        shown, start = self._text(f"{rank}. "), 0
        for begin, end in find_answers(text, golden):
            shown += self._text(text[start:begin], "blue")
            shown += self._text(text[begin:end], "black on yellow")
            start = end
        return shown + self._text(f"{text[start:]} ", "blue") + self._text(f"({passage.score:.3g})", "dim")

    def _indented(self, text: Text) -> None:
        self._console.print(Padding(text, (0, 0, 0, 2)))

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(self._text(text, style))

    def _text(self, text: str, style: str = "") -> Text:
        return Text(printable(text, self._console.encoding), style=style)


def page_through(gallery: Gallery, printer: Printer, read_line: Callable[[str], str]) -> None:
    """Show item after item until the reader leaves.

    Args:
        gallery: Gallery to print.
        printer: Prints the items.
        read_line: Shows a prompt and returns what the reader types, like `input`.
    """
    number, command = 0, "n"
    printer.item(number)
    while True:
        try:
            # Enter alone repeats the last command that can be repeated.
            command = read_line("[n, p, number, /words, r, w, m, ?, q] ").strip() or command
        except (EOFError, KeyboardInterrupt):
            return
        if command == "q":
            return
        if command == "?":
            print(KEYS, end="")
            command = "n"
            continue
        found = _next(gallery.items, number, command)
        if found is None:
            print(f"No further one for {command!r}; ? lists the keys.")
            command = "n"
            continue
        number = found
        command = "n" if command.isdecimal() else command
        printer.item(number)


def _next(items: Sequence[Item], number: int, command: str) -> int | None:
    """Index of the item that a command leads to; None if it leads nowhere."""
    if command.isdecimal():
        return int(command) - 1 if 0 < int(command) <= len(items) else None
    if command == "p":
        return number - 1 if number > 0 else None
    wanted: dict[str, Callable[[Episode], bool]] = {
        "n": lambda episode: True,
        "r": lambda episode: episode.correct,
        "w": lambda episode: not episode.correct,
        "m": lambda episode: episode.num_malformed > 0,
    }
    if command.startswith("/"):
        wanted[command] = lambda episode: episode.holds(command[1:])
    if (test := wanted.get(command)) is None:
        return None
    later = range(number + 1, len(items))
    return next((at for at in later if any(episode and test(episode) for episode in items[at].episodes)), None)
