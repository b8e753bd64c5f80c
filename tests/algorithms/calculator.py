"""A calculator environment as its user would write it: registered with Gymnasium, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import gymnasium

from agentic_rag_env import FreeText


class Calculator(gymnasium.Env[str, str]):
    """Two numbers are to be added, and a calculator adds any two numbers on demand."""

    metadata = {"render_modes": [], "action_ends": ["</calc>", "</answer>"]}  # noqa: RUF012
    observation_space = action_space = FreeText()  # type: ignore[assignment]

    def __init__(self, largest: int = 9) -> None:
        self.largest = largest

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.a, self.b = self.np_random.integers(0, self.largest + 1, size=2).tolist()
        return f"{self.a} + {self.b} = ?\n", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if answer := re.search(r"<answer>(.*?)</answer>", action, re.DOTALL):
            correct = answer[1].strip() == str(self.a + self.b)
            info = {"correct": correct, "answer": answer[1].strip(), "action": "answer"}
            return "", float(correct), True, False, info
        if asked := re.search(r"<calc>\s*(\d{1,9})\s*\+\s*(\d{1,9})\s*</calc>", action):
            return f"\n{int(asked[1]) + int(asked[2])}\n", 0.0, False, False, {"correct": False, "action": "calc"}
        return "\nAsk or answer.\n", 0.0, False, False, {"correct": False, "action": "malformed"}


gymnasium.register("Calculator-v1", entry_point=Calculator, max_episode_steps=3)
