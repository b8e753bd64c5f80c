from __future__ import annotations

import io
import sys

import pytest

from agentic_rag_env import ConfigurationError
from agentic_rag_env.terminal import escape_what_streams_lack, print_line, printable, rich_console


def test_printable() -> None:
    assert printable("a\nb\u00a0é東") == "a\nb\u00a0é東"
    assert printable("\x1b[2J\r\t\x00\u202e\ud800\x9b") == "\\x1b[2J\\r\\t\\x00\\u202e\\ud800\\x9b"
    assert printable("é東", "ascii") == "\\xe9\\u6771"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", "\\x1b]0;é東\n"), ("cp1252", "\\x1b]0;é\\u6771\n"), ("ascii", "\\x1b]0;\\xe9\\u6771\n")],
)
def test_a_line_steers_no_terminal_and_fits_its_encoding(encoding: str, expected: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    print_line("\x1b]0;é東", stream)
    assert raw.getvalue().decode(encoding) == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_whoever_prints_what_an_encoding_lacks_is_not_ended(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    escape_what_streams_lack()
    for stream in (out, err):
        print("runs/東京 –", file=stream, flush=True)
        written = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert written == {"ascii": b"runs/\\u6771\\u4eac \\u2013\n", "cp1252": b"runs/\\u6771\\u4eac \x96\n"}[encoding]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_what_streams_lack()  # a notebook's streams have no encoding to change


def test_without_rich_a_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ConfigurationError, match=r"^Playing in a terminal needs the library rich: pip install rich"):
        rich_console("Playing in a terminal")


def test_codes_of_emojis_stay_as_strangers_wrote_them(capsys: pytest.CaptureFixture[str]) -> None:
    rich_console("A test").print("the answer :dog: [bold]", end="")
    assert capsys.readouterr().out == "the answer :dog: [bold]"
