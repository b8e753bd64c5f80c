"""ARC probes (agentic RAG capabilities) find where an agent is weak, for any `generate(prompts) -> texts` callable.

    from agentic_rag_env.probes import DEFAULT_PROBES, Material, play, run_probes

    episodes = play(generate, envs)
    material = Material(envs.dataset, generate, episodes, envs.retriever, envs.dataset.corpus)
    figures = run_probes(material, DEFAULT_PROBES)
    figures["thinking"]["gain"]  # {"value": 0.04, "n": 600, "interval": (0.02, 0.06), "best": "high", ...}

The published tables do not define prompts, passages and matching. So call figures by these definitions "ARC-ours".
Importing this package registers the built-in probes.
"""

# These files register the built-in probes.
from agentic_rag_env.probes import grounding, reading, searching  # noqa: F401
from agentic_rag_env.probes.endpoints import Endpoint, EndpointConfig, EndpointError
from agentic_rag_env.probes.figures import Figure, Figures, figure, interval, macro_interval, share
from agentic_rag_env.probes.gold import find_gold
from agentic_rag_env.probes.material import Generate, Material, Prompt, of_search, play, run_probes

#: The probes that are run by default.
DEFAULT_PROBES = ("source_referencing", "thinking", "query_rewriting", "search_behaviour")

__all__ = [
    "DEFAULT_PROBES",
    "Endpoint",
    "EndpointConfig",
    "EndpointError",
    "Figure",
    "Figures",
    "Generate",
    "Material",
    "Prompt",
    "figure",
    "find_gold",
    "interval",
    "macro_interval",
    "of_search",
    "play",
    "run_probes",
    "share",
]
