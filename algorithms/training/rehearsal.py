"""Lets the hooks of an algorithm run once on made-up numbers, so that a run does not end in its first training step."""

from __future__ import annotations

import copy
from typing import Any

import torch

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.algorithm import NEEDS, Algorithm
from algorithms.learner.types import Batch, Tokens

#: Fields that a need fills in under another name.
_NEED_OF = {"old_values": "values"} | {need: need for need in NEEDS}
_LENGTH, _VOCAB = 4, 8


def rehearse(algorithm: Algorithm) -> None:
    """Refuse an algorithm whose hooks fail because they read what it does not declare.

    A hook that fails for another reason is left to the training step: it may well refuse made-up numbers.

    Raises:
        ConfigurationError: A field that `needs` does not name, or that `estimate_advantages` does not return, was read
            while it was empty, and the hook failed.
    """
    read: set[str] = set()
    try:
        with torch.random.fork_rng(devices=[]):
            _run_hooks(copy.deepcopy(algorithm), read)
    except Exception as error:
        undeclared = sorted({_NEED_OF[name] for name in read if name in _NEED_OF} - algorithm.needs)
        advice = f"declare needs = frozenset({{{', '.join(map(repr, sorted({*algorithm.needs, *undeclared})))}}})"
        if not undeclared and {"advantages", "returns"} & read:
            advice = "return them from estimate_advantages"
        elif not undeclared:
            return
        raise ConfigurationError(
            f"{type(algorithm).__name__} reads {', '.join(sorted(read))}, which nobody fills in, and fails "
            f"({type(error).__name__}: {error}); {advice}. See Algorithm in algorithms.learner.algorithm."
        ) from error


def _run_hooks(algorithm: Algorithm, read: set[str]) -> None:
    """Call the hooks as a training step does, and note which empty fields they read."""
    rows = 2 * algorithm.rollouts_per_prompt
    count = rows * (_LENGTH - 1)
    written = torch.arange(_LENGTH).expand(rows, -1) > 0
    of_batch = [need for need in algorithm.needs if need in Batch.__slots__]
    ids = torch.zeros(rows, _LENGTH, dtype=torch.long)
    batch: Any = _noting(Batch, read)(
        input_ids=ids,
        attention_mask=torch.ones(rows, _LENGTH, dtype=torch.bool),
        response_mask=written,
        written_ids=ids,
        old_logprobs=-written.float(),
        rewards=torch.arange(rows).float() % 2,
        correct=torch.arange(rows) % 2 == 1,
        group_ids=torch.arange(rows) // algorithm.rollouts_per_prompt,
        **{need: torch.zeros(rows, _LENGTH) for need in of_batch},
    )
    batch.token_rewards = algorithm.shape_rewards(batch)
    estimate = algorithm.estimate_advantages(batch)
    if estimate is not None:
        batch.advantages, batch.returns = estimate
    declared = {"logprobs", "entropy", *algorithm.needs, *(["old_values"] if "values" in algorithm.needs else [])}
    filled = {
        name: torch.zeros(count, *([_VOCAB] if name.endswith("logits") else []))
        for name in declared & set(Tokens.__slots__)
    }
    for name, column in zip(("advantages", "returns"), estimate or (), strict=False):
        filled |= {} if column is None else {name: column[written]}
    tokens: Any = _noting(Tokens, read)(
        ids=torch.zeros(count, dtype=torch.long),
        sequence_ids=torch.arange(rows).repeat_interleave(_LENGTH - 1),
        correct=batch.correct.repeat_interleave(_LENGTH - 1),
        old_logprobs=-torch.ones(count),
        **filled,
    )
    algorithm.token_loss(tokens)
    if "values" in algorithm.needs:
        algorithm.value_loss(tokens)
    algorithm.step_metrics(batch)


def _noting(record: Any, read: set[str]) -> type:
    """A kind of record that notes the names of its empty fields that are read."""

    def noting(self: Any, name: str) -> Any:
        value = record.__getattribute__(self, name)
        if value is None:
            read.add(name)
        return value

    return type(record.__name__, (record,), {"__getattribute__": noting})
