"""Reads the arguments of an environment's `reset`, and refuses those that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.settings import Allowed, check_value

_SEED = Allowed("an integer of at least 0, or None", lambda value: value is None or (_is_integer(value) and value >= 0))


def check_options(options: Mapping[str, Any] | None, allowed: Iterable[str]) -> Mapping[str, Any]:
    """Refuse an option of `reset` that does not exist.

    Returns:
        The options; empty for None.

    Raises:
        ConfigurationError: An option does not exist; the message names it and the options that do.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ConfigurationError(
            f"options of reset must be a mapping such as {{'question_index': 0}}, got {options!r}."
        )
    for given in options:
        if given not in allowed:
            raise ConfigurationError(f"reset has no option {given!r}.{did_you_mean(str(given), allowed)}")
    return options


def question_number(index: Any, num_questions: int, source: str) -> int:
    """The option `question_index` of a single environment.

    Args:
        index: The value that was given.
        num_questions: Number of questions in the dataset.
        source: Where the questions are, for the error.

    Raises:
        ConfigurationError: The index is no integer in [0, num_questions).
    """
    words = f"an integer in [0, {num_questions}) for {source}"
    check_value(
        "question_index", index, Allowed(words, lambda value: _is_integer(value) and 0 <= value < num_questions)
    )
    return int(index)


def row_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """The argument `seed` of a vector environment, one for each row: an int s gives row i the seed s + i.

    Raises:
        ConfigurationError: The argument is no seed, and no sequence or array of `num_envs` seeds.
    """
    if seed is None or _is_integer(seed):
        check_value("seed", seed, _SEED)
        return [None if seed is None else int(seed) + row for row in range(num_envs)]
    seeds = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise ConfigurationError(f"seed must be an integer, {num_envs} of them or None, got {seed!r}.")
    if len(seeds) != num_envs:
        raise ConfigurationError(f"seed needs one value per row, {num_envs}, got {len(seeds)}.")
    for row, value in enumerate(seeds):
        check_value(f"seed of row {row}", value, _SEED)
    return [None if value is None else int(value) for value in seeds]


def rows_and_questions(
    options: Mapping[str, Any] | None, num_envs: int, num_questions: int, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """The options `reset_mask` and `question_index` of a vector environment.

    Args:
        options: The options that were given.
        num_envs: Number of rows N.
        num_questions: Number of questions to choose from.
        source: Where the questions are, for the error.

    Returns:
        Rows to reset, [N] bool, and the question of each row, [N] int64; -1 draws one.

    Raises:
        ConfigurationError: There is an unknown option, or an option has another form.
    """
    options = check_options(options, ("reset_mask", "question_index"))
    mask = _array(options.get("reset_mask", np.ones(num_envs, dtype=np.bool_)))
    if mask.shape != (num_envs,) or mask.dtype != np.bool_ or not mask.any():
        raise ConfigurationError(
            f"reset_mask must be an array of {num_envs} bools with at least one True, got {options['reset_mask']!r}."
        )
    indices = _array(options.get("question_index", -1))
    if indices.shape not in ((), (num_envs,)) or not np.issubdtype(indices.dtype, np.integer):
        raise ConfigurationError(
            f"question_index must be an int or {num_envs} of them, got {options['question_index']!r}."
        )
    indices = np.broadcast_to(indices, (num_envs,)).astype(np.int64)
    bad = indices[mask & ((indices < -1) | (indices >= num_questions))]
    if len(bad):
        raise ConfigurationError(
            f"question_index must be in [0, {num_questions}) for {source}, or -1 to draw one, got {bad[0]}."
        )
    return mask, indices


def _array(given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError:  # lists of different lengths
        return np.empty(0, dtype=object)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
