"""The environment: a question, a search engine, and an agent that writes text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.episode import Episode, FinalTurn, Found, Rules, StepResult, search
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, REWARDS
from agentic_rag_env.resets import check_options, question_number
from agentic_rag_env.retrievers.base import Retriever, build_wrapped
from agentic_rag_env.rewards import Reward
from agentic_rag_env.settings import COUNT, check_value, one_of, or_none
from agentic_rag_env.spaces import FreeText
from agentic_rag_env.terminal import printable
from agentic_rag_env.types import Question, StepInfo


class AgenticRAGEnv(gymnasium.Env[str, str]):
    """The agent answers a question. It writes text turn by turn, and may search a corpus before it answers.

    ## Description
    In each turn the agent writes a text that ends in one action. `<search> query </search>` retrieves passages. The
    agent reads them between `<information>` and `</information>` before it writes its next turn.
    `<answer> text </answer>` ends the episode. Other text, such as the agent's thoughts, has no effect. This is the
    protocol of Search-R1 [1], which DGPO [2] shares.

    ## Action Space
    `FreeText()`: any string, the text of one turn. It is cut at its earliest `</search>` or `</answer>`; the action is
    the text between that tag and the first matching opening tag. A turn without such a span, or with an empty query,
    is malformed: it costs a turn, and the environment replies with a hint. Actions are read from this text alone; tags
    in a question or a passage have no effect.

    ## Observation Space
    `FreeText()`: only what the environment appends to the transcript. `reset` observes the whole prompt, a search
    observes its passages, a malformed turn the hint, and the end of an episode the empty string.

    ## Starting State
    The prompt with a question that is drawn uniformly from the dataset. `reset(options={"question_index": i})` asks
    question number i instead.

    ## Rewards
    Every step but the last earns 0. The last one earns what the reward function makes of the whole episode: by default
    1 for an answer that matches exactly after normalization, else 0. An episode that a failed search ends earns 0.

    ## Episode End
    - Termination: the agent answers.
    - Truncation: it is out of turns. There are `max_turns` turns that may search. Then, by `final_turn`:
        - `"none"`: the episode is over.
        - `"no_search"`: one more turn follows, in which an answer counts and a search is reported but not executed.
        - `"forced"`: one more turn like that follows. The observation before it ends with `<answer>`, and the agent's
          text is read as its continuation, unless it writes the tag itself.
    - Truncation: the search failed (the retriever raised `RetrieverError`); `info["error"]` holds the message.

    ## Information
    `reset` and `step` return the same keys, see `StepInfo`:

    | key | type | meaning |
    | --- | --- | --- |
    | `question_id` | str | of the dataset |
    | `turn` | int | turns taken, 0 after `reset` |
    | `action` | str or None | "search", "answer", "malformed"; None after `reset` |
    | `query` | str or None | of a search |
    | `passages` | tuple of `Passage` | found by the search, uncut; empty if it was not executed |
    | `answer` | str or None | of an answer |
    | `exact_match`, `f1` | float | of the answer; 0.0 without one |
    | `num_searches` | int | searches executed in this episode |
    | `correct` | bool | an answer matched exactly |
    | `error` | str or None | why the search failed |
    | `ending` | `Ending` or None | "answered", "out_of_turns" or "search_failed"; None while the episode goes on |

    ## Arguments
    ```python
    import gymnasium
    import agentic_rag_env

    env = gymnasium.make("AgenticRAG-v0", dataset="tiny", retriever="bm25", max_turns=4, top_k=3)
    prompt, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("<search> who founded it </search>")
    ```

    Args:
        dataset: A registered name, a mapping (`{"name": "jsonl", ...}`), a `QuestionSet`, or an iterable of `Question`.
        retriever: A registered name, a mapping (`{"name": "bm25", "k1": 1.2}`), or an object with the method `search`.
            By name or mapping it is built over the corpus of the dataset.
        reward: A registered name, a mapping (`{"name": "format_aware", ...}`), or a function of an `Outcome`, which is
            called when an episode ends, with or without an answer.
        prompt: Name of a template in `prompts.PROMPTS`, or a template that contains `{question}`.
        max_turns: Number of turns that may search, malformed ones included; at least 1.
        top_k: Most passages per search; at least 1.
        final_turn: "none", "no_search" or "forced", see above.
        max_observation_chars: Most characters of a passage observation, tags included; longer passage text is cut, the
            tags never are. None: unbounded. The hint is never cut.
        max_observation_tokens: The same in tokens; only one of the two bounds can be set.
        tokenizer: Counts tokens; an object with `encode(text, add_special_tokens=False)`, such as those of
            transformers and tokenizers.
        render_mode: "ansi": `render` returns the transcript so far. "human": the transcript is printed as it grows.

    Raises:
        ConfigurationError: A setting can't work; the message says what is allowed.
        UnknownNameError: A registered name is unknown.

    ## References
    [1] B. Jin et al., "Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement Learning",
    2025. https://arxiv.org/abs/2503.09516

    [2] Distillation-Guided Policy Optimization. https://github.com/omron-sinicx/dgpo

    ## Version History
    * v0: Initial version
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["ansi", "human"],
        "render_fps": 4,
        "action_ends": CLOSING_TAGS,
    }

    def __init__(
        self,
        dataset: str | Mapping[str, Any] | Iterable[Any] = "tiny",
        retriever: str | Mapping[str, Any] | Retriever = "bm25",
        reward: str | Mapping[str, Any] | Reward = "exact_match",
        prompt: str = "bare",
        max_turns: int = 4,
        top_k: int = 3,
        final_turn: FinalTurn = "no_search",
        max_observation_chars: int | None = None,
        max_observation_tokens: int | None = None,
        tokenizer: Any = None,
        render_mode: str | None = None,
    ) -> None:
        self.rules = Rules(
            reward=REWARDS.build(reward),
            prompt=prompt,
            max_turns=max_turns,
            final_turn=final_turn,
            max_observation_chars=max_observation_chars,
            max_observation_tokens=max_observation_tokens,
            tokenizer=tokenizer,
        )
        check_value("top_k", top_k, COUNT)
        check_value("render_mode", render_mode, or_none(one_of(self.metadata["render_modes"])))
        self.dataset = _build_dataset(dataset)
        self.retriever = build_wrapped("the environment", retriever, self.dataset.corpus)
        self.top_k = top_k
        self.render_mode = render_mode
        self.action_space = FreeText()
        self.observation_space = FreeText()
        self._episode = Episode(self.rules)
        self._num_printed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, StepInfo]:  # type: ignore[override]
        """Begin an episode.

        Args:
            seed: Seeds the generator that draws questions; None leaves it as it is.
            options: `{"question_index": i}` asks question i of the dataset instead of a drawn one.

        Returns:
            The prompt, and the info.

        Raises:
            ConfigurationError: There is no such option or question.
        """
        super().reset(seed=seed)
        index = check_options(options, ("question_index",)).get("question_index")
        if index is None:
            index = int(self.np_random.integers(len(self.dataset)))
        else:
            index = question_number(index, len(self.dataset), f"dataset {self.dataset.name!r}")
        prompt = self._episode.begin(self.dataset[index])
        self._num_printed = 0
        self._print_news()
        return prompt, self._episode.report()

    @property
    def question(self) -> Question | None:
        """The question of the current episode, None before the first."""
        return self._episode.question

    def step(self, action: str) -> StepResult:  # type: ignore[override]
        """Take one turn.

        Args:
            action: What the agent writes.

        Returns:
            Observation, reward, terminated, truncated, info.

        Raises:
            ResetNeededError: No episode is running.
            TypeError: The action is no string.
            ConfigurationError: The reward is no finite number.
            Exception: Whatever the retriever or the reward raises, with a note naming the question. A `RetrieverError`
                alone is not raised; it truncates the episode.
        """
        query = self._episode.act(action)
        found: Found | None = None
        if query is not None:
            assert self.question is not None
            (found,) = search(self.retriever, [query], self.top_k, [self.question.id])
        result = self._episode.observe(found)
        self._print_news()
        return result

    def render(self) -> str | None:
        """The transcript of the current episode in mode "ansi"; None in the others."""
        if self.render_mode is None:
            gymnasium.logger.warn('render was called without a render mode; pass render_mode="ansi" or "human".')
        return "".join(self._episode.transcript) if self.render_mode == "ansi" else None

    def _print_news(self) -> None:
        if self.render_mode == "human":
            news = "".join(self._episode.transcript[self._num_printed :])
            print(printable(news, sys.stdout.encoding), end="" if self._episode.running else "\n", flush=True)
            self._num_printed = len(self._episode.transcript)


def _build_dataset(spec: Any) -> QuestionSet:
    dataset = DATASETS.build(spec)
    if isinstance(dataset, QuestionSet):
        return dataset
    if not isinstance(dataset, Iterable):
        raise ConfigurationError(
            f"dataset must be a name, a mapping, a QuestionSet or an iterable of Question, got {dataset!r}."
        )
    questions = tuple(dataset)
    for question in questions:
        if not isinstance(question, Question):
            raise ConfigurationError(f"dataset must be an iterable of Question, got {question!r} in it.")
    return QuestionSet("questions", questions)
