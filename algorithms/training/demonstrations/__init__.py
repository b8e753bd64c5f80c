"""Demonstrations: where they come from, which ones are kept, and the files that keep them.

| source | who writes the turns |
| --- | --- |
| `teacher` | the teacher model |
| `file` | whoever wrote a file of turns |
| `expert` | a script, where the gold passages of a question are known |
| `endpoint` | a model behind an OpenAI-compatible server |

Each turn goes through the environments of the run, which alone decide observations, rewards and correctness. A new
source is a class with the decorator `DEMONSTRATION_SOURCES.register(name, DemonstrationsConfig)`.
"""

# Each of these files registers its source.
from algorithms.training.demonstrations import endpoint, expert, file, teacher  # noqa: F401
from algorithms.training.demonstrations.collection import Demonstrations, cached, collect, reason_to_drop
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES

__all__ = ["DEMONSTRATION_SOURCES", "Demonstrations", "cached", "collect", "reason_to_drop"]
