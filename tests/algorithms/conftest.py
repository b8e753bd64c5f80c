from __future__ import annotations

import pytest
from small_runs import DGPO, Run, train


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Demonstrations that small runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def dgpo_run(tmp_path_factory, cache) -> Run:
    """A whole run of two stages, never interrupted."""
    return train(tmp_path_factory.mktemp("runs") / "dgpo", cache, *DGPO)
