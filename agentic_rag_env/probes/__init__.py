"""ARC probes (agentic RAG capabilities) find where an agent is weak, for any `generate(prompts) -> texts` callable.

    from agentic_rag_env.probes import DEFAULT_PROBES, Material, play, run_probes

    episodes = play(generate, envs)
    material = Material(envs.dataset, generate, episodes, envs.retriever, envs.dataset.corpus)
    figures = run_probes(material, DEFAULT_PROBES)
    figures["thinking"]["gain"]  # {"value": 0.04, "n": 600, "interval": (0.02, 0.06), "best": "high", ...}

The published tables do not define prompts, passages and matching. So call figures by these definitions "ARC-ours".
Importing this package registers the built-in probes.
"""

from agentic_rag_env.answers import holds_answer
from agentic_rag_env.probes.endpoints import Endpoint, EndpointConfig, EndpointError
from agentic_rag_env.probes.figures import Best, Figure, Figures, figure, interval, macro_interval, share
from agentic_rag_env.probes.gold import Gold, find_gold
from agentic_rag_env.probes.grounding import Counterfactual, GroundingConfig, Shuffled
from agentic_rag_env.probes.material import Generate, Material, Probe, Prompt, of_search, play, run_probes
from agentic_rag_env.probes.reading import SourceReferencing, SourceReferencingConfig, thinking
from agentic_rag_env.probes.searching import query_rewriting, search_behaviour

#: The probes that are run by default.
DEFAULT_PROBES = ("source_referencing", "thinking", "query_rewriting", "search_behaviour")

__all__ = [
    "DEFAULT_PROBES",
    "Best",
    "Counterfactual",
    "Endpoint",
    "EndpointConfig",
    "EndpointError",
    "Figure",
    "Figures",
    "Generate",
    "Gold",
    "GroundingConfig",
    "Material",
    "Probe",
    "Prompt",
    "Shuffled",
    "SourceReferencing",
    "SourceReferencingConfig",
    "figure",
    "find_gold",
    "holds_answer",
    "interval",
    "macro_interval",
    "of_search",
    "play",
    "query_rewriting",
    "run_probes",
    "search_behaviour",
    "share",
    "thinking",
]
