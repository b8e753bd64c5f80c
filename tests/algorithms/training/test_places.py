"""Places outside that saved settings name: used only if the command line names them too."""

from __future__ import annotations

from typing import Any

import pytest

import agentic_rag_env  # noqa: F401
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.http_client import ClientConfig
from agentic_rag_env.registry import RETRIEVERS
from algorithms.training.run_files import places, require_named

URL = "http://wiki.example:8000/retrieve"


@pytest.mark.parametrize("key", ["proxy_url", "aws_endpoint"])
def test_addresses_in_options_of_a_storage(key: str) -> None:
    lance = {"name": "lancedb", "uri": "s3://bucket/folder", "storage_options": {key: "evil.example:3128"}}
    settings = {"retriever": {"name": "cached", "retriever": lance}}
    named = dict(places(settings))
    assert named == {
        "retriever.retriever.uri": "s3://bucket/folder",
        f"retriever.retriever.storage_options.{key}": "evil.example:3128",
    }
    with pytest.raises(ConfigurationError, match=rf"storage_options\.{key} is evil\.example:3128"):
        require_named(settings, ["s3://bucket/folder"], "a run")
    require_named(settings, list(named.values()), "a run")


def test_a_proxy() -> None:
    retriever: dict[str, Any] = {"name": "http", "url": URL, "proxy": "http://evil.example:3128"}
    with pytest.raises(ConfigurationError, match=r"retriever\.proxy is http://evil\.example:3128"):
        require_named({"retriever": retriever}, [URL], "a run")
    with pytest.raises(ConfigurationError, match=r"proxy must be an address such as .*, got 'evil\.example:3128'"):
        RETRIEVERS.build({**retriever, "proxy": "evil.example:3128"}, corpus=None)


@pytest.mark.parametrize("proxy", [None, "environment", "http://proxy:3128", "socks5://proxy:1080"])
def test_proxies_that_are_allowed(proxy: str | None) -> None:
    assert ClientConfig(proxy=proxy).proxy == proxy


def test_a_name_that_only_begins_like_a_declared_one() -> None:
    assert places({"retriever": {"name": "cached", "path": "c.sqlite", "path_of_mine": "x"}}) == [
        ("retriever.path", "c.sqlite")
    ]
