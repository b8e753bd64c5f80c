"""Random numbers derived from keys that say what a draw is for, so a resumed run needs no generator state."""

from __future__ import annotations

import hashlib
import json
import operator
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for library code that draws from them.

    Args:
        seed: A number in [0, 2**32).
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng(*key: int | str) -> np.random.Generator:
    """A NumPy generator that depends on the key alone.

    Args:
        *key: What the numbers are for, such as `(seed, "minibatches", step)`. Different keys, even `1` and `"1"`, give
            unrelated streams.
    """
    return np.random.default_rng(_digest(key))


def generator(*key: int | str) -> torch.Generator:
    """A torch generator on the CPU that depends on the key alone; see `rng`."""
    return torch.Generator().manual_seed(_digest(key) % 2**63)


def _digest(key: tuple[int | str, ...]) -> int:
    parts = [part if isinstance(part, str) else operator.index(part) for part in key]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest(), "big")
