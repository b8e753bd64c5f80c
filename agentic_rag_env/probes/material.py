"""Holds what probes look at: a model that continues texts, questions, and the episodes that it played with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np

from agentic_rag_env.actions import ANSWER_OPEN, CLOSING_TAGS
from agentic_rag_env.answers import holds_answer
from agentic_rag_env.episode import search
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.probes.figures import Best, Figure, Figures, figure, share
from agentic_rag_env.probes.gold import Gold, find_gold, identity
from agentic_rag_env.prompts import format_passages, information_block, render_prompt
from agentic_rag_env.registry import PROBES
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.types import Ending, Found, Passage, Question, StepInfo
from agentic_rag_env.vector import AgenticRAGVectorEnv, info_at

#: Continues each prompt, greedily where possible, without repeating the prompt. None: the prompt is too long to read.
Generate: TypeAlias = Callable[[Sequence[str]], Sequence[str | None]]

#: The infos of an episode's steps, in their order.
EpisodeInfos: TypeAlias = Sequence[StepInfo]

#: Opens an answer without a thought. Agents of the protocol think before they answer, so the thought is closed at once.
DIRECTLY = f"<think></think>{ANSWER_OPEN}"

#: Number of queries in one search, as in an ordinary step of many environments.
_QUERIES_AT_ONCE = 128


class Prompt(str):
    """A prompt that knows its parts, for models with a chat template; for all others it is one string.

    Args:
        message: The user's message to the model.
        transcript: The text after it in the model's own turn, such as passages that it found.
        opening: The beginning of the model's next words.
    """

    __slots__ = ("message", "opening", "transcript")

    message: str
    transcript: str
    opening: str

    def __new__(cls, message: str, transcript: str = "", opening: str = "") -> Prompt:
        """See the class."""
        prompt = super().__new__(cls, message + transcript + opening)
        prompt.message, prompt.transcript, prompt.opening = message, transcript, opening
        return prompt


@dataclass
class Material:
    """The material that probes look at.

    Attributes:
        questions: The questions, at least one.
        generate: Continues prompts; None where probes look only at episodes.
        episodes: One episode for each question; None where probes look only at `generate`.
        retriever: Finds distractors, and the passages that the question itself would have found. Without a retriever,
            distractors are the gold passages of other questions.
        corpus: Passages in which the ids of gold passages are looked up.
        prompt: Name of a template in `prompts.PROMPTS`, or a template that contains `{question}`.
        top_k: Number of passages per search.
        seed: Seed of all draws and of the bootstrap.
        envs: The environments in which the episodes were played; probes that play again obey their rules. None: the
            default rules.
        num_failed_searches: How many searches of the probes have failed so far.
    """

    questions: Sequence[Question]
    generate: Generate | None = None
    episodes: Sequence[EpisodeInfos] | None = None
    retriever: Retriever | None = None
    corpus: Iterable[Passage] | None = None
    prompt: str = "bare"
    top_k: int = 3
    seed: int = 0
    envs: AgenticRAGVectorEnv | None = None
    num_failed_searches: int = field(default=0, init=False)

    @property
    def has_golden_answers(self) -> bool:
        """Whether any question has an answer to compare with; an environment's own tasks have none."""
        return any(question.golden_answers for question in self.questions)

    @cached_property
    def gold(self) -> list[Gold]:
        """The evidence of each question."""
        return find_gold(self.questions, self.corpus)

    @cached_property
    def readable(self) -> list[int]:
        """Numbers of the questions whose gold passages the model can be given to read."""
        return [number for number, gold in enumerate(self.gold) if gold.passages]

    @cached_property
    def found_verbatim(self) -> dict[int, Sequence[Passage]]:
        """The best `2 * top_k` passages that each question finds as the query, by number of the question.

        Questions whose search fails are left out, and a warning says so. Without a retriever all are left out.
        """
        if self.retriever is None:
            return {}
        results: list[Found] = []
        for start in range(0, len(self.questions), _QUERIES_AT_ONCE):
            portion = self.questions[start : start + _QUERIES_AT_ONCE]
            queries, ids = zip(*((question.text, question.id) for question in portion), strict=True)
            results += search(self.retriever, queries, 2 * self.top_k, ids)
        failed = [result for result in results if isinstance(result, RetrieverError)]
        self.num_failed_searches += len(failed)
        if failed:
            warnings.warn(
                f"The probes' search failed for {len(failed)} of {len(results)} questions, which are left out where it "
                f"matters; the last one: {failed[-1]}",
                stacklevel=2,
            )
        return {number: found for number, found in enumerate(results) if not isinstance(found, RetrieverError)}

    @property
    def any_search_failed(self) -> bool:
        """Whether a search has failed and a probe went on without it, so that another run may give other figures."""
        return self.num_failed_searches > 0

    @cached_property
    def evidence(self) -> list[list[Passage]]:
        """A perfect search result for each readable question: all gold passages, then distractors up to `top_k`.

        Agents have learned to read blocks of `top_k` passages. A shorter block would test something else.
        """
        gold = [(number, self.gold[number].passages) for number in self.readable]
        return [[*passages, *self.distractors(number, self.top_k - len(passages))] for number, passages in gold]

    @cached_property
    def direct_answers(self) -> list[str | None]:
        """The model's answers to the readable questions when it has the evidence and no room for a thought."""
        return self.read(self.evidence, self.readable, DIRECTLY)

    def distractors(self, number: int, count: int) -> list[Passage]:
        """Passages that are not gold for the question and hold none of its answers.

        The best matches of the question come first, then gold passages of other questions.

        Args:
            number: Number of the question.
            count: Most passages; the list is shorter if there are no more.
        """
        # We draw a few more passages than are needed, because some hold an answer.
        rows = self.draw(number).integers(max(len(self._pool), 1), size=4 * max(count, 0) + 16)
        others = [self._pool[int(row)] for row in rows] if self._pool else []
        taken = {identity(passage) for passage in self.gold[number].passages}
        chosen: list[Passage] = []
        for passage in (*self.found_verbatim.get(number, ()), *others):
            if len(chosen) >= count:
                break
            if (key := identity(passage)) not in taken:
                taken.add(key)
                if not holds_answer(passage.contents, self.questions[number].golden_answers):
                    chosen.append(passage)
        return chosen

    @cached_property
    def _pool(self) -> list[Passage]:
        """The gold passages of all questions."""
        return list({identity(passage): passage for gold in self.gold for passage in gold.passages}.values())

    def read(self, passages: Sequence[Sequence[Passage]], numbers: Sequence[int], opening: str) -> list[str | None]:
        """Let the model go on after passages.

        Args:
            passages: The passages that the model reads for each question, as one block.
            numbers: Numbers of the questions.
            opening: The beginning of the model's words.

        Returns:
            The model's text for each question, with the opening in front, cut at the earliest closing tag. None where
            the prompt was too long for the model.

        Raises:
            ConfigurationError: There is no `generate`, or it doesn't return a text for each prompt.
        """
        prompts = [
            Prompt(
                render_prompt(self.prompt, self.questions[number].text),
                information_block(format_passages(shown)),
                opening,
            )
            for number, shown in zip(numbers, passages, strict=True)
        ]
        texts = generated(self.generate, prompts)
        return [None if text is None else cut(opening + text) for text in texts]

    def figure(self, values: Any, best: Best = None, weights: Any = None) -> Figure:
        """See `figures.figure`; the seed is that of the material."""
        return figure(values, best, weights=weights, seed=self.seed)

    def share(self, values: Any, best: Best = None, weights: Any = None) -> Figure:
        """See `figures.share`; the seed is that of the material."""
        return share(values, best, weights=weights, seed=self.seed)

    def search_failed(self, places: Sequence[int], count: int) -> Figures:
        """The share of episodes whose search failed, if there are any; they are no failure of the model.

        Args:
            places: Places of the other episodes, see `worked`.
            count: Number of all episodes.
        """
        failed = ~np.isin(np.arange(count), places)
        return {"search_failed": self.share(failed)} if failed.any() else {}

    def draw(self, *key: int) -> np.random.Generator:
        """A generator that depends on the seed and on the key of the draw, and on nothing else."""
        return np.random.default_rng((self.seed, *key))


#: Looks at the material and reports figures by name.
Probe: TypeAlias = Callable[[Material], Figures]
_AnyProbe = TypeVar("_AnyProbe")


def of_search(probe: _AnyProbe) -> _AnyProbe:
    """Declare that a probe looks at golden answers, passages or searches; a decorator.

    `run_probes` skips it where an environment brings tasks that have none.
    """
    probe.of_search = True  # type: ignore[attr-defined]
    return probe


def run_probes(material: Material, probes: Iterable[Any]) -> dict[str, Figures]:
    """Figures of several probes.

    Probes of search are skipped, with a warning that names them, where no question has a golden answer.

    Args:
        material: The material that they look at.
        probes: Names, or mappings with `name` and settings.

    Returns:
        The figures by the name of the probe.

    Raises:
        UnknownNameError: There is no such probe.
        ConfigurationError: A probe has no such setting or is named twice, or the material lacks what a probe needs.
    """
    built: dict[str, Probe] = {}
    for spec in probes:
        name = spec if isinstance(spec, str) else str(spec["name"])
        if name in built:
            raise ConfigurationError(f"Probe {name!r} is named twice, and figures go by the name; leave one out.")
        built[name] = PROBES.build(spec)
    skipped = [name for name, probe in built.items() if getattr(probe, "of_search", False)]
    if material.has_golden_answers:
        skipped = []
    if skipped:
        warnings.warn(
            f"Probes of search are skipped: {', '.join(skipped)}. The questions have no golden answers, so there is "
            "nothing to find or to read.",
            stacklevel=2,
        )
    return {name: probe(material) for name, probe in built.items() if name not in skipped}


def play(
    generate: Generate | None, envs: AgenticRAGVectorEnv, num_questions: int | None = None
) -> list[list[StepInfo]]:
    """Play episodes with any model that continues texts, for the probes that look at episodes.

    Args:
        generate: The model.
        envs: Environments with `autoreset_mode` "Disabled".
        num_questions: How many questions to play, from the first of their dataset on; None: all of them.

    Returns:
        The infos of the steps for each question. Where a prompt is too long for the model, its episode ends as
        "out_of_tokens".

    Raises:
        ConfigurationError: The environments reset themselves.
    """
    if envs.autoreset_mode.value != "Disabled":
        raise ConfigurationError(
            f"play decides itself which question comes next, but the environments have autoreset_mode "
            f"{envs.autoreset_mode.value!r}; make them with autoreset_mode='Disabled'."
        )
    count = min(num_questions or len(envs.dataset), len(envs.dataset))
    episodes: list[list[StepInfo]] = []
    for start in range(0, count, envs.num_envs):
        episodes += _play_together(generate, envs, range(start, min(start + envs.num_envs, count)))
    return episodes


def worked(episodes: Sequence[EpisodeInfos]) -> list[int]:
    """Places of the episodes that no failed search has ended."""
    return [place for place, episode in enumerate(episodes) if Ending.of(episode[-1]) is not Ending.SEARCH_FAILED]


def executed_searches(episode: EpisodeInfos) -> Iterator[StepInfo]:
    """The steps of an episode in which a search was carried out."""
    before = 0
    for info in episode:
        if info["num_searches"] > before:
            yield info
        before = info["num_searches"]


def cut(text: str, action_ends: Sequence[str] = CLOSING_TAGS) -> str:
    """A turn up to the earliest end of an action."""
    ends = [text.find(end) + len(end) for end in action_ends if end in text]
    return text[: min(ends)] if ends else text


def _play_together(generate: Generate | None, envs: AgenticRAGVectorEnv, numbers: range) -> list[list[StepInfo]]:
    mask = np.arange(envs.num_envs) < len(numbers)
    indices = np.full(envs.num_envs, -1)
    indices[mask] = numbers
    messages, _ = envs.reset(options={"reset_mask": mask, "question_index": indices})
    transcripts = [""] * len(numbers)
    episodes: list[list[StepInfo]] = [[] for _ in numbers]
    running = list(range(len(numbers)))
    while running:
        texts = generated(generate, [Prompt(messages[row], transcripts[row]) for row in running])
        actions: list[str | None] = [None] * envs.num_envs
        for row, text in zip(running, texts, strict=True):
            if text is None and episodes[row]:  # there is no room for another turn
                episodes[row][-1] = envs.cut_off(row).info
            else:
                actions[row] = text or ""
        observations, _, terminations, truncations, infos = envs.step(actions)
        running = [row for row in running if actions[row] is not None]
        for row in running:
            episodes[row].append(info_at(infos, row))
            transcripts[row] += cut(actions[row] or "") + observations[row]
        running = [row for row in running if not terminations[row] and not truncations[row]]
    return episodes


def generated(generate: Generate | None, prompts: Sequence[str]) -> list[str | None]:
    """The model's continuation of each prompt; None for a prompt that is too long for it.

    Raises:
        ConfigurationError: There is no `generate`, or it doesn't return a text for each prompt.
    """
    if generate is None:
        raise ConfigurationError("This probe lets the model read, and the material has no 'generate'.")
    texts = list(generate(prompts)) if prompts else []
    if len(texts) != len(prompts):
        raise ConfigurationError(f"generate returned {len(texts)} texts for {len(prompts)} prompts.")
    return texts
