"""Selects parts of a set of questions that depend on ids and a seed, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from agentic_rag_env.settings import COUNT, Allowed, check_value
from agentic_rag_env.types import Question


def share(question_id: str, num_shares: int) -> int:
    """The number of the share that an id belongs to, in [0, num_shares): the same in every file and process.

    All shares have about equal size.
    """
    digest = hashlib.blake2b(question_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_shares


def sample(questions: Sequence[Question], num_questions: int | None, seed: int, of: str) -> Sequence[Question]:
    """A random sample in the order of the questions; a larger sample of the same seed contains the smaller.

    Args:
        questions: The questions to draw from.
        num_questions: Size of the sample; None takes all.
        seed: Decides what is drawn.
        of: What the questions are, for the error.

    Raises:
        ConfigurationError: There are fewer questions than are asked for.
    """
    if num_questions is None:
        return questions
    words = f"an integer in [1, {len(questions)}], as many as {of} has, or None for all"
    check_value("num_questions", num_questions, Allowed(words, lambda n: COUNT.test(n) and n <= len(questions)))
    chosen = np.random.default_rng(seed).permutation(len(questions))[:num_questions]
    return tuple(questions[index] for index in sorted(chosen))
