"""The paper's published figures: exact match of arXiv:2508.20324, Qwen2.5 3B to 0.5B, a single run each."""

from __future__ import annotations

import re
from collections.abc import Sequence

DATASETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wiki", "musique", "bamboogle")
AVERAGE = "avg"

_NAMES = {
    "raw": "Student-0.5B",
    "teacher": "Teacher-3B",
    "sft_ppo": "SFT→PPO",
    "sft": "SeqKD",
    "distillm": "DistiLLM",
}
_ROWS: dict[str, tuple[float | None, ...]] = {
    "raw": (0.004, 0.006, 0.007, 0.007, 0.015, 0.000, 0.000, 0.006),
    "teacher": (0.365, 0.569, 0.393, 0.340, 0.368, 0.135, 0.298, 0.353),
    "ppo": (0.306, 0.444, 0.379, 0.205, 0.218, 0.041, 0.073, 0.238),
    "sft_ppo": (0.338, 0.415, None, 0.296, None, 0.088, 0.250, 0.289),
    "gkd": (0.266, 0.408, 0.358, 0.216, 0.217, 0.055, 0.161, 0.240),
    "sft": (0.331, 0.416, 0.364, 0.283, 0.273, 0.089, 0.169, 0.275),
    "kd": (0.331, 0.431, 0.373, 0.286, 0.284, 0.091, 0.290, 0.298),
    "distillm": (0.333, 0.442, 0.373, 0.288, 0.270, 0.095, 0.209, 0.287),
    "taid": (0.325, 0.427, 0.365, 0.290, 0.270, 0.079, 0.218, 0.282),
    "dgpo": (0.378, 0.481, 0.402, 0.342, 0.303, 0.120, 0.274, 0.329),
}
#: Averages of the ablation table. The row with GRPO has none: a figure of the paper shows its collapse.
_ABLATIONS = {"no_cold_start": 0.320, "uniform_kl": 0.314, "no_teacher_guidance": 0.306, "inverted_order": 0.286}

#: Exact match by method, named as in the zoo and its ablations, and by dataset or `AVERAGE`.
PUBLISHED: dict[str, dict[str, float]] = {
    name: {column: score for column, score in zip((*DATASETS, AVERAGE), scores, strict=True) if score is not None}
    for name, scores in _ROWS.items()
} | {name: {AVERAGE: score} for name, score in _ABLATIONS.items()}

#: Gain by the teacher's guidance in the paper's ablation.
GUIDANCE = PUBLISHED["dgpo"][AVERAGE] - PUBLISHED["no_teacher_guidance"][AVERAGE]

_ALIASES = {
    "naturalquestions": "nq",
    "2wikimultihopqa": "2wiki",
    "2wikiqa": "2wiki",
    "seqkd": "sft",
    "inverted": "inverted_order",
    "without_cold_start": "no_cold_start",
    "without_teacher_guidance": "no_teacher_guidance",
}


def published_name(method: str) -> str:
    """The paper's name of a method."""
    return _NAMES.get(method, method.upper() if method in _ROWS else method)


def matching_dataset(group: str) -> str | None:
    """The paper's dataset that a group of questions is named after; None if there is none."""
    name = re.sub(r"[^a-z0-9]", "", group.lower())
    name = _ALIASES.get(name, name)
    return name if name in DATASETS else None


def matching_method(base: str) -> str | None:
    """The paper's method that one of ours stands for; None if there is none."""
    name = _ALIASES.get(base, base)
    return name if name in PUBLISHED else None


def shown_datasets(groups: Sequence[str]) -> dict[str, str]:
    """Map groups of questions to the paper's datasets; other groups are left out."""
    return {group: name for group in groups if (name := matching_dataset(group)) is not None}
