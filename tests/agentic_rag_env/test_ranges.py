from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from agentic_rag_env import ConfigurationError, Registry
from agentic_rag_env.settings import (
    COUNT,
    FRACTION,
    Allowed,
    above,
    at_least,
    check_settings,
    check_value,
    one_of,
    or_none,
    within,
)


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "words"),
    [
        (at_least(2), [2, 2.5, np.float32(2), math.inf], [1.9, "2", None, True, math.nan, 2j, [2]], "at least 2"),
        (above(0), [0.1, 1], [0, -1, "1", math.nan, True], "above 0"),
        (within(1, 5), [1, 5, 2.5], [0.9, 5.1, math.nan, "3"], "in [1, 5]"),
        (FRACTION, [0, 1, 0.5], [-0.1, 1.1, "0.5"], "in [0, 1]"),
        (COUNT, [1, 7, np.int64(3)], [0, -1, 1.0, "1", True, None, [1]], "an integer of at least 1"),
        (one_of(["red", "green"]), ["red"], ["blue", None, 1, {}], "one of red, green"),
        (or_none(COUNT, "all"), [None, 1], [0, "None", 2.0], "an integer of at least 1, or None for all"),
        (or_none(one_of(["red"])), [None, "red"], ["", 0], "one of red, or None"),
        (Allowed("even", lambda value: value % 2 == 0), [2, 0], [1, "%d", None, [2]], "even"),
    ],
)
def test_a_range_knows_its_values_and_says_itself(
    allowed: Allowed, good: list[Any], bad: list[Any], words: str
) -> None:
    for value in good:
        check_value("size", value, allowed)
    for value in bad:
        with pytest.raises(ConfigurationError) as caught:
            check_value("size", value, allowed)
        assert str(caught.value) == f"size must be {words}, got {value!r}."


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^colour must be one of red, green, got 'gren'\. Did you mean 'green'"
    ):
        check_value("colour", "gren", one_of(["red", "green"]))
    with pytest.raises(ConfigurationError, match=r"or None, got 'gren'\. Did you mean 'green'\?"):
        check_value("colour", "gren", or_none(one_of(["red", "green"])))


@dataclass
class PumpConfig:
    width: float = 1.0
    depth: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, above(0), "width", "depth")


def test_settings_are_checked_where_they_are_declared_and_a_registry_says_whose_they_are() -> None:
    with pytest.raises(ConfigurationError, match=r"^depth must be above 0, got -1\.$"):
        PumpConfig(depth=-1)
    pumps = Registry("pump")
    pumps.register("hand", PumpConfig)(lambda config: config)
    with pytest.raises(ConfigurationError, match=r"^pump 'hand': depth must be above 0, got -1\.$"):
        pumps.build({"name": "hand", "depth": -1})
