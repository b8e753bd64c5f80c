"""A script that demonstrates the calculator, as a user's plug-in."""

from __future__ import annotations

import re
from collections.abc import Sequence

from algorithms.learner.config import DemonstrationsConfig
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES
from algorithms.training.demonstrations.source import Authored, Dialogue


@DEMONSTRATION_SOURCES.register("calculator_script", DemonstrationsConfig)
class CalculatorScript(Authored):
    """Asks the calculator, and answers with what it said. It knows no zeros, and gives up on them."""

    def write(self, dialogues: Sequence[Dialogue]) -> list[str]:
        texts = []
        for dialogue in dialogues:
            a, b = re.findall(r"\d+", dialogue.prompt)
            if dialogue.observations:
                texts.append(f"<answer>{dialogue.observations[-1].strip()}</answer>")
            elif "0" in (a, b):
                dialogue.dropped = "zero"
                texts.append("")
            else:
                texts.append(f"<calc>{a}+{b}</calc>")
        return texts
