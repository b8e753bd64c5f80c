"""How a policy writes: settings alone, without the libraries that use them."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentic_rag_env.settings import COUNT, Allowed, at_least, check_settings, one_of
from algorithms.learner.config import WITHOUT_EFFECT

CUDA_GRAPHS = ("off", "auto", "on")


@dataclass
class RolloutConfig:
    """How the policy writes.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token (greedy) instead of drawing one.
        top_p: Draw among the fewest tokens with at least this share of the probability, in (0, 1]; 1: all.
        top_k: Draw among this many most probable tokens; 0: all.
        max_new_tokens: Most tokens of one action.
        max_tokens: Most tokens of an episode: prompt, actions and observations; at least a token of each prompt and
            action. An episode that needs more is cut off, and earns what the reward gives without an answer.
        cuda_graphs: "on": a GPU records decode steps and replays them, which saves the time that Python takes to launch
            each of their operations. "auto": so, if some greedy tokens come out the same, and else without. "off":
            without. Tokens are decided in the same way, but rows are computed in larger groups, which round otherwise.
            A file of settings must put "on" and "off" into quotes, because YAML takes them for true and false.
        decode_during_search: Most tokens that each of the other rows writes while environments take a turn; 0: they
            pause. It pays where a search takes long, such as one behind HTTP. It should be as many tokens as take about
            the time of a search: results that come earlier wait for them. The environments then take their turns in a
            thread of their own. What is computed never depends on time. Tokens are decided in the same way, but rows
            are computed in other groups, which round otherwise.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 48
    max_tokens: int = 4096
    cuda_graphs: str = field(default="off", metadata=WITHOUT_EFFECT)
    decode_during_search: int = field(default=0, metadata=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, at_least(0), "temperature", "top_k", "decode_during_search")
        check_settings(self, Allowed("in (0, 1]", lambda value: 0 < value <= 1), "top_p")
        check_settings(self, COUNT, "max_new_tokens")
        check_settings(self, at_least(2), "max_tokens")
        check_settings(self, one_of(CUDA_GRAPHS), "cuda_graphs")
