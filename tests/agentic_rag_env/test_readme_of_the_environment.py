"""The examples of the environment's page run as they stand there, in their order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import registry as registered

import agentic_rag_env
from agentic_rag_env.registry import DATASETS, ENVS, PROBES, RETRIEVERS, REWARDS

PAGE = (Path(agentic_rag_env.__file__).parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def _as_before() -> Iterator[None]:
    """What the examples register is forgotten."""
    registries = (DATASETS, ENVS, PROBES, RETRIEVERS, REWARDS)
    names = [registry.names() for registry in registries]
    known = dict(registered)
    yield
    for registry, before in zip(registries, names, strict=True):
        for name in set(registry.names()) - set(before):
            del registry._entries[name]
    registered.clear()
    registered.update(known)


@pytest.mark.usefixtures("_as_before")
def test_the_examples() -> None:
    assert len(EXAMPLES) == 6
    for example in EXAMPLES:
        assert "assert" in example or "@DATASETS" in example  # says itself what comes out
        exec(compile(example, "README.md", "exec", dont_inherit=True), {"__name__": "example"})
    assert "rivers" in DATASETS.names()
    assert "Sums-v0" in registered
    with pytest.raises(agentic_rag_env.ConfigurationError, match="dataset 'rivers': split must be one of train, dev"):
        DATASETS.build({"name": "rivers", "split": "tets"})
    assert gymnasium.make("Sums-v0").spec is not None


def test_links_lead_somewhere() -> None:
    folder = Path(agentic_rag_env.__file__).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert links
    for link in links:
        assert (folder / link).exists(), link
