"""Demonstrations of a model behind any OpenAI-compatible server, over several turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes.endpoints import Endpoint as Client
from agentic_rag_env.probes.endpoints import EndpointConfig
from algorithms.learner.config import DemonstrationsConfig
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES, Authored, Dialogue


@DEMONSTRATION_SOURCES.register("endpoint", DemonstrationsConfig)
class Endpoint(Authored):
    """Chats with the server, once for each episode. The prompt and the observations are a user's messages.

    Raises:
        ConfigurationError: The address or the model is not given.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name in ("url", "model"):
            if getattr(self.config, name) is None:
                raise ConfigurationError(f"demonstrations.source=endpoint needs demonstrations.{name} beside it.")
        self.client = Client(
            EndpointConfig(
                url=str(self.config.url),
                model=str(self.config.model),
                api="chat",
                max_tokens=self.rollout.max_new_tokens,
                temperature=self.rollout.temperature,
                num_parallel=min(self.config.num_parallel, self.envs.num_envs),
                api_key_variable=self.config.api_key_variable,
            ),
            self.envs.metadata["action_ends"],
        )

    @property
    def fingerprint(self) -> Any:
        """The model and the server's address; never the key."""
        return [self.config.url, self.config.model]

    def write(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """Ask the server for the next turns of all episodes. One that it cut off or left empty is not worth paying for.

        Raises:
            EndpointError: The server failed, also when it was asked again, or it has refused all requests so far.
        """
        messages = self.client.chat([self._messages(dialogue) for dialogue in dialogues])
        self.costs = dict(self.client.costs)
        for dialogue, message in zip(dialogues, messages, strict=True):
            dialogue.dropped = message.problem or (None if message.text.strip() else "no_text")
        return [message.text for message in messages]

    def _messages(self, dialogue: Dialogue) -> list[dict[str, str]]:
        messages = [{"role": "user", "content": dialogue.prompt}]
        for action, observation in zip(dialogue.actions, dialogue.observations, strict=True):
            messages.append({"role": "assistant", "content": action})
            messages.append({"role": "user", "content": observation.strip()})
        return messages
