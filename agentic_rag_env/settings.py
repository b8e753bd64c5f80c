"""The values that a setting may have. A range describes itself in words, and one check refuses values outside of it.

    @dataclass
    class BM25Config:
        k1: float = 0.9
        b: float = 0.4

        def __post_init__(self) -> None:
            check_settings(self, at_least(0), "k1")
            check_settings(self, FRACTION, "b")

A value outside raises a ConfigurationError that names the setting, the range and the value.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

from agentic_rag_env.errors import ConfigurationError


class Allowed(NamedTuple):
    """The values that a setting may have.

    Attributes:
        words: The words that follow "must be", such as "at least 1".
        test: Tells whether a value is one of them; a TypeError says that it is not.
        names: The values themselves where they are names; a typo gets the nearest one as a hint.
    """

    words: str
    test: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def at_least(low: float) -> Allowed:
    """Numbers from `low` on."""
    return Allowed(f"at least {low}", lambda value: _is_number(value) and value >= low)


def above(low: float) -> Allowed:
    """Numbers greater than `low`."""
    return Allowed(f"above {low}", lambda value: _is_number(value) and value > low)


def within(low: float, high: float) -> Allowed:
    """Numbers from `low` to `high`, both included."""
    return Allowed(f"in [{low}, {high}]", lambda value: _is_number(value) and low <= value <= high)


def one_of(names: Iterable[str]) -> Allowed:
    """One of some names."""
    names = tuple(names)
    return Allowed(f"one of {', '.join(names)}", lambda value: value in names, names)


def or_none(allowed: Allowed, meaning: str = "") -> Allowed:
    """The allowed values, and None too.

    Args:
        allowed: The other values that are allowed.
        meaning: The meaning of None, as in "None for all".
    """
    words = f"{allowed.words}, or {f'None for {meaning}' if meaning else 'None'}"
    return Allowed(words, lambda value: value is None or allowed.test(value), allowed.names)


#: Positive integers.
COUNT = Allowed(
    "an integer of at least 1",
    lambda value: isinstance(value, Integral) and not isinstance(value, bool) and value >= 1,  # type: ignore[operator]
)

#: Texts. A command line reads 2018 as a number.
TEXT = Allowed("a text (on a command line, '\"2018\"' for one of digits)", lambda value: isinstance(value, str))

#: Places of files and folders.
PLACE = Allowed("the path of a file or folder", lambda value: isinstance(value, (str, os.PathLike)))

#: Shares and probabilities.
FRACTION = within(0, 1)


def check_value(name: str, value: Any, allowed: Allowed) -> None:
    """Refuse a value that is not allowed.

    Raises:
        ConfigurationError: The value is not allowed; the message names the setting, what is allowed and what was given.
    """
    try:
        good = allowed.test(value)
    except TypeError:
        good = False
    if not good:
        hint = likely_name(str(value), allowed.names)
        raise ConfigurationError(f"{name} must be {allowed.words}, got {value!r}.{hint}")


def check_settings(config: Any, allowed: Allowed, *names: str) -> None:
    """Refuse settings that are not allowed; call it in the `__post_init__` of their dataclass.

    Args:
        config: The object that has the settings as attributes.
        allowed: The values that each of them may have.
        *names: Names of the settings.

    Raises:
        ConfigurationError: A setting is not allowed; the message names the first, what is allowed and what was given.
    """
    for name in names:
        check_value(name, getattr(config, name), allowed)


def likely_name(given: str, names: Iterable[str]) -> str:
    """A hint at what a misspelt name was to be, with a blank before it; empty if nothing comes close."""
    close = difflib.get_close_matches(given, sorted(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def meanings_of(config: type) -> dict[str, str]:
    """What the docstrings of a dataclass of settings and of its bases say of each setting, as one line."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        section = (base.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^ {4,8}(\w+(?:, \w+)*): ((?:.+\n?)(?: {9,}.+\n?)*)", section, re.MULTILINE):
            found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
