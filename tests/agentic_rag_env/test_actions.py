from __future__ import annotations

import time

import pytest

from agentic_rag_env.actions import CLOSING_TAGS, Answer, Malformed, Search, parse_action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<search> who built it </search>", Search("who built it")),
        ("<think> hm </think> <search>a\nb</search> more", Search("a\nb")),
        ("<answer> Paris </answer>", Answer("Paris")),
        ("<answer></answer>", Answer("")),
        ("<answer> \n </answer>", Answer("")),
        # The earliest closing tag decides, whichever kind it is.
        ("<answer> Paris </answer> <search> q </search>", Answer("Paris")),
        ("<search> q </search> <answer> Paris </answer>", Search("q")),
        ("<answer> Paris <search> q </search>", Search("q")),
        ("<search> q <answer> Paris </answer>", Answer("Paris")),
        # The first opening tag of that kind decides.
        ("<search> a <search> b </search>", Search("a <search> b")),
        ("<answer> a <answer> b </answer> </answer>", Answer("a <answer> b")),
        # Information that the model made up is text like any other.
        ("<information>x</information><search>q</search>", Search("q")),
    ],
)
def test_actions_are_read_from_the_span_that_closes_first(text: str, action: object) -> None:
    assert parse_action(text) == action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither </search> nor </answer>"),
        ("just prose", "neither </search> nor </answer>"),
        ("<search> unclosed", "neither </search> nor </answer>"),
        ("<SEARCH> q </SEARCH>", "neither </search> nor </answer>"),
        ("< search > q </ search >", "neither </search> nor </answer>"),
        ("q </search>", "</search> without <search> before it"),
        ("<answer> x </search>", "</search> without <search> before it"),
        ("</answer> <answer> Paris </answer>", "</answer> without <answer> before it"),
        ("<search></search>", "empty query"),
        ("<search> \t\n </search> <answer> Paris </answer>", "empty query"),
    ],
)
def test_malformed_turns_say_why(text: str, reason: str) -> None:
    assert parse_action(text) == Malformed(reason)


def test_cutting_after_the_closing_tag_changes_nothing() -> None:
    text = "<think> x </think> <search> q </search> <answer> a </answer> </search>"
    end = min(text.find(tag) + len(tag) for tag in CLOSING_TAGS)
    assert parse_action(text[:end]) == parse_action(text) == Search("q")


@pytest.mark.parametrize(
    "unit", ["<search>", "</", "<", "<answer><search>", "</search", "<search></answer", "<sear</answe", "\ud800<"]
)
@pytest.mark.parametrize("end", ["", "</search>", "</answer>"])
def test_ten_times_the_text_takes_about_ten_times_as_long(unit: str, end: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit)) + end
        runs = []
        for _ in range(5):
            start = time.process_time()
            parse_action(text)
            runs.append(time.process_time() - start)
        return min(runs)

    assert seconds(2_000_000) < 40 * seconds(200_000) + 1e-3
