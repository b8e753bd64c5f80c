"""The base of the numeric views, which holds the environment behind them."""

from __future__ import annotations

from typing import Any, TypeVar

import gymnasium

from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import ConfigurationError

ActType = TypeVar("ActType")
ObsType = TypeVar("ObsType")


class View(gymnasium.Env[ObsType, ActType]):
    """An `AgenticRAGEnv` with other spaces.

    It is no `gymnasium.Wrapper`, because checkers and learners look behind wrappers and would find text.

    Args:
        env: The environment to view: an `AgenticRAGEnv`, or wrappers around one, which are left away.

    Raises:
        ConfigurationError: `env` is another environment.

    Attributes:
        env: The environment that is viewed.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        if not isinstance(env, gymnasium.Env) or not isinstance(env.unwrapped, AgenticRAGEnv):
            raise ConfigurationError(f"{type(self).__name__} views an AgenticRAGEnv, got {env!r}.")
        self.env = env.unwrapped
        self.metadata = self.env.metadata
        self.render_mode = self.env.render_mode

    def render(self) -> str | None:
        """See `AgenticRAGEnv.render`."""
        return self.env.render()

    def close(self) -> None:
        """See `AgenticRAGEnv.close`."""
        self.env.close()
