"""Makes a `generate` callable of a model behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, ...)."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from agentic_rag_env.http_client import REFUSALS, ClientConfig, HttpClient, ServiceError
from agentic_rag_env.probes.material import CLOSING_TAGS, Prompt, cut
from agentic_rag_env.retrievers.base import encodable
from agentic_rag_env.settings import COUNT, Allowed, at_least, check_settings, one_of

APIS = ("completions", "chat")
_URL = Allowed(
    "an address such as http://127.0.0.1:8000/v1",
    lambda value: isinstance(value, str) and value.startswith(("http://", "https://")),
)


#: Most tokens that a reply may claim; what claims more is not counted.
MAX_COUNT = 2**40
#: Why a message is of no use: the server stopped at `max_tokens`, before any end of an action; the prompt is too long
#: for the model; the server refuses this request, as content filters do, or its reply has no text.
CUT_OFF, PROMPT_TOO_LONG, REFUSED = "cut_off", "prompt_too_long", "refused"
#: How servers say that a prompt is too long (vLLM, SGLang, OpenAI, llama.cpp).
_TOO_LONG = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)


class EndpointError(AgenticRAGError, RuntimeError):
    """An endpoint gave no text; the message says where and why."""


@dataclass
class EndpointConfig(ClientConfig):
    """Where the model is, and how it is asked.

    Attributes:
        url: Address up to the version, such as `http://127.0.0.1:8000/v1`.
        model: The server's name for the model.
        api: "completions": the prompt is one text, for base models. "chat": the prompt is the message of a user and the
            beginning of the reply, which the server must be able to continue (`continue_final_message`: vLLM, SGLang).
        max_tokens: Most tokens of a reply.
        temperature: Sampling temperature; 0 is greedy.
        num_parallel: Number of requests under way at once.
        api_key_variable: Name of the environment variable that holds the key; without the variable no key is sent.
    """

    url: str
    model: str
    api: str = "completions"
    max_tokens: int = 256
    temperature: float = 0.0
    num_parallel: int = 8
    api_key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = field(default=60.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, one_of(APIS), "api")
        check_settings(self, _URL, "url")
        check_settings(self, COUNT, "max_tokens", "num_parallel")
        check_settings(self, at_least(0), "temperature")


class Message(NamedTuple):
    """What an endpoint wrote.

    Attributes:
        text: The text, cut at its earliest end of an action; empty if there is none.
        problem: None, `CUT_OFF`, `PROMPT_TOO_LONG` or `REFUSED`.
        said: How the server refused.
    """

    text: str
    problem: str | None = None
    said: str = ""


class Endpoint:
    """Continues prompts with one request for each.

    No stop strings are sent, because servers leave them out of the reply. Then nobody could tell `</search>` from
    `</answer>`. The reply is cut at its earliest end of an action instead.

    Args:
        config: Where the model is, and how it is asked.
        action_ends: Texts that end an action.

    Raises:
        ConfigurationError: The library `httpx` is missing, or the key is no text that a request can carry.

    Attributes:
        costs: The costs so far: `requests` answered, `prompt_tokens` and `completion_tokens` as the server counts them
            (0 if it does not), and `seconds` of waiting, added up over requests under way at once.
    """

    def __init__(self, config: EndpointConfig, action_ends: Sequence[str] = CLOSING_TAGS) -> None:
        self.config, self._action_ends = config, tuple(action_ends)
        self._has_answered = False
        self.costs: dict[str, float] = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0}
        self._lock = threading.Lock()
        key = os.environ.get(config.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigurationError(
                f"The key in the variable {config.api_key_variable} holds characters that no request can carry (line "
                "ends, control characters, or letters beyond ASCII); copy it again."
            )
        path = "completions" if config.api == "completions" else "chat/completions"
        self._client = HttpClient(
            [f"{config.url.rstrip('/')}/{path}"],
            config,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """Continue prompts; see `material.Generate`.

        Raises:
            EndpointError: The endpoint failed in every try, or refused a prompt.
        """
        messages = self._messages([self._request(prompt) for prompt in prompts])
        if refused := [message.said for message in messages if message.problem == REFUSED]:
            raise EndpointError(refused[0])
        return [None if message.problem == PROMPT_TOO_LONG else message.text for message in messages]

    def chat(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[Message]:
        """The next message of each conversation; `config.api` must be "chat".

        Args:
            conversations: Lists of messages with `role` and `content`; the last message is a user's.

        Raises:
            EndpointError: The endpoint failed in every try, or it has refused everything so far.
        """
        assert self.config.api == "chat"
        messages = self._messages([{**self._common(), "messages": list(messages)} for messages in conversations])
        if messages and not self._has_answered:
            raise EndpointError(messages[0].said)
        return messages

    def close(self) -> None:
        """Close the open connections."""
        self._client.close()

    def _messages(self, payloads: Sequence[Mapping[str, Any]]) -> list[Message]:
        with ThreadPoolExecutor(self.config.num_parallel) as pool:
            return list(pool.map(self._message, payloads))

    def _message(self, payload: Mapping[str, Any]) -> Message:
        started = time.perf_counter()
        try:
            reply = self._client.post(payload).json()
        except ServiceError as error:
            if error.status not in REFUSALS:
                raise EndpointError(str(error)) from error
            return Message("", PROMPT_TOO_LONG if _TOO_LONG.search(error.said) else REFUSED, str(error))
        self._count(reply, time.perf_counter() - started)
        try:
            choice = reply["choices"][0]
            limit_reached = choice.get("finish_reason") == "length"
            text = choice["text"] if self.config.api == "completions" else choice["message"]["content"]
            if isinstance(text, list):  # parts, as some servers of reasoning models send them
                text = "".join(part["text"] for part in text if part["type"] == "text")
            text = cut(encodable(text or ""), self._action_ends)
        except (AttributeError, KeyError, IndexError, TypeError):
            return Message("", REFUSED, f"{self.config.url}: the reply holds no text: {str(reply)[:200]}")
        self._has_answered = True
        return Message(text, CUT_OFF if limit_reached and not text.endswith(self._action_ends) else None)

    def _count(self, reply: Any, seconds: float) -> None:
        usage = reply.get("usage") if isinstance(reply, dict) else None
        told = usage if isinstance(usage, dict) else {}
        with self._lock:
            self.costs["requests"] += 1
            self.costs["seconds"] += seconds
            for name in ("prompt_tokens", "completion_tokens"):
                count = told.get(name)
                self.costs[name] += count if isinstance(count, int) and 0 <= count <= MAX_COUNT else 0

    def _common(self) -> dict[str, Any]:
        config = self.config
        return {"model": config.model, "max_tokens": config.max_tokens, "temperature": config.temperature}

    def _request(self, prompt: str) -> dict[str, Any]:
        common = self._common()
        if self.config.api == "completions":
            return {**common, "prompt": str(prompt)}
        message = prompt.message if isinstance(prompt, Prompt) else str(prompt)
        messages = [{"role": "user", "content": message}]
        begun = prompt[len(message) :]
        if not begun:
            return {**common, "messages": messages}
        messages.append({"role": "assistant", "content": begun})
        return {**common, "continue_final_message": True, "add_generation_prompt": False, "messages": messages}
