"""Where a training step gets its trajectories: the policy's fresh rollouts, or stored demonstrations."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes.endpoints import CUT_OFF
from agentic_rag_env.retrievers.base import hash_of
from agentic_rag_env.terminal import print_line
from algorithms.learner import ranks, seeding
from algorithms.learner.algorithm import Algorithm, Progress
from algorithms.learner.types import RolloutStats, Trajectory
from algorithms.rollout.player import Player
from algorithms.rollout.replay import Replay
from algorithms.rollout.tokenization import encode_prompts
from algorithms.training import demonstrations
from algorithms.training.build import Environments, Networks
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES, Demonstrations
from algorithms.training.fingerprints import of_playing, of_plugins, of_retriever
from algorithms.training.settings import RunConfig, settings_with_effect


class Sources:
    """Trajectories of a run. Seed, stage and step decide them, so that a resumed run draws them again.

    Args:
        config: The run's settings.
        networks, environments: Who plays, and where.
        stages: The algorithms of the run.
        run_dir: Keeps demonstrations that no other run may use.

    Attributes:
        demonstrations: Demonstrations, collected or read, of each algorithm that trains on them.
        replay: The policy's latest trajectories in the present stage.
        demonstrations_s: Seconds that collecting or reading the demonstrations took.
        origins: What the source of each stage with demonstrations says of itself, hashed.

    Raises:
        ConfigurationError: There are no demonstrations for the last algorithm. (An earlier one is skipped in that case,
            with a warning.) Or rollouts would be drawn from another distribution than the policy gradient's.
    """

    def __init__(
        self,
        config: RunConfig,
        networks: Networks,
        environments: Environments,
        stages: Sequence[Algorithm],
        run_dir: Path,
    ) -> None:
        _check_sampling(config, stages)
        self._run_dir = run_dir
        self._config, self._networks, self._environments = config, networks, environments
        self.replay = Replay(0)
        self._players: dict[float | None, Player] = {}
        self.origins: list[str] = []
        self._sampled_tokens: dict[str, int] = {}
        started = time.perf_counter()
        self.demonstrations = {
            stage: self._demonstrate(stage.config) for stage in stages if "teacher" in stage.trains_on
        }
        self.demonstrations_s = time.perf_counter() - started
        kept_out = {_question_id(one) for stage in self.demonstrations for one in self.held_out(stage)}
        self._to_train_on = {
            stage: [one for one in found.trajectories if _question_id(one) not in kept_out]
            for stage, found in self.demonstrations.items()
        }
        for stage, found in self.demonstrations.items():
            if len(found.trajectories) < found.num_wanted:
                _report_shortage(config, stages, stages.index(stage), found, self._source_name(stage.config))
            if found.trajectories and not self.to_train_on(stage):
                raise ConfigurationError(
                    f"{stage.name} has {len(found.trajectories)} demonstrations, and none is left to train on without "
                    f"the questions held out for validation (num_validation); lower it, now "
                    f"{', '.join(f'{each.num_validation} in {each.name}' for each in self.demonstrations)}."
                )

    @property
    def teacher_tokens(self) -> int:
        """Tokens that models of this run wrote for its demonstrations; stages may share these."""
        return sum(self._sampled_tokens.values())

    def to_train_on(self, algorithm: Algorithm) -> list[Trajectory]:
        """The demonstrations that an algorithm trains on: none about a question that any stage is validated on."""
        return self._to_train_on.get(algorithm, [])

    def held_out(self, algorithm: Algorithm) -> list[Trajectory]:
        """The demonstrations that an algorithm is validated on; none if it is not validated."""
        found = self.demonstrations.get(algorithm)
        return found.trajectories[: algorithm.num_validation] if found else []

    def demonstrated(self, algorithm: Algorithm, stage: int, step: int) -> list[Trajectory]:
        """Take the batch of the step-th training step from passes over the demonstrations, each in its own order."""
        size = algorithm.config.batch_size
        stored = self.to_train_on(algorithm)
        epoch, batch = divmod(step, -(-len(stored) // size))
        order = seeding.rng(self._config.seed, stage, "demonstrations", epoch).permutation(len(stored))
        return [stored[row] for row in order[batch * size :][:size]]

    def played(self, algorithm: Algorithm, stage: int, step: int) -> tuple[list[Trajectory], RolloutStats]:
        """Play a batch of fresh trajectories of the policy on training questions. Groups stand together.

        Raises:
            RetrieverError: More episodes than the configured share end in a failed search.
        """
        of_each, num_questions = algorithm.rollouts_per_prompt, len(self._environments.dataset("train"))
        size = algorithm.config.batch_size // of_each
        questions = draw_questions(self._config.seed, stage, step * size, size, num_questions)
        player = self._player(algorithm.sampling_temperature)
        player.engine.set_weights(self._networks.writer())
        return player.rollout(
            np.repeat(questions, of_each).tolist(),
            seed=(self._config.seed, stage, step),
            group_ids=np.repeat(np.arange(size), of_each).tolist(),
        )

    def _player(self, temperature: float | None) -> Player:
        """The player of the policy in the training environments; kept, because reading a large vocabulary is slow."""
        if temperature not in self._players:
            networks, envs = self._networks, self._environments.envs("train")
            self._players[temperature] = networks.player(networks.writer(), envs, temperature)
        return self._players[temperature]

    def _source_name(self, wanted: Any) -> str:
        """Who demonstrates: what the settings name, or what "auto" stands for in this run."""
        if (name := wanted.demonstrations.source) != "auto":
            return name
        has_script = self._environments.envs("train").rules is not None
        return "expert" if self._config.model.teacher is None and has_script else "teacher"

    def _demonstrate(self, wanted: Any) -> Demonstrations:
        """Get the demonstrations that an algorithm's settings ask for."""
        config, envs = self._config, self._environments.envs("train")
        settings = {name: getattr(config, name) for name in ("env", "retriever", "reward", "seed", "num_envs")}
        settings["rollout"] = settings_with_effect(vars(config.rollout), "rollout.")
        networks, chosen = self._networks, wanted.demonstrations
        name = self._source_name(wanted)
        source = DEMONSTRATION_SOURCES.get(name).factory(chosen, networks, envs, config.rollout)
        if chosen.source == "auto" and name == "expert" and ranks.is_first():
            print_line("Demonstrations come from the scripted expert (demonstrations.source), as there is no teacher.")
        asking = {
            "count": wanted.num_demonstrations,
            "max_questions": wanted.num_demonstrations * wanted.max_questions_per_demonstration,
            "filters": [name for name in chosen.filters if wanted.correct_only or name != "correct"],
        }
        settings |= {"vocab_size": networks.vocab_size, "device": networks.device.type, **asking}
        # A model writes otherwise in another precision; what else writes is computed with in float64 alone.
        if networks.precision != "float32" and (source.by_model or networks.precision == "float64"):
            settings["precision"] = networks.precision
        if config.model.teacher_dtype != "auto":
            settings["teacher_dtype"] = config.model.teacher_dtype
        settings["teacher_temperature"] = config.model.teacher_temperature
        searched = of_retriever(envs.retriever)
        settings |= {"searched": searched, "source": name, "of": source.fingerprint}
        # No registry here knows the environments that only Gymnasium does.
        if plugins := of_plugins(source, *getattr(envs, "layers", ())):
            settings["plugins"] = plugins
        teacher = networks.place_of_teacher if source.by_model else None
        tokenizer = networks.teacher_tokenizer if source.by_model else networks.tokenizer
        key = of_playing(settings, teacher or f"no model: {name}", tokenizer, envs.dataset)
        # What unknown code, an unknown index or one that failed has answered, and the tasks that an environment brings,
        # may differ tomorrow, so it is for this run alone.
        own = self._run_dir / "demonstrations" / f"{key}.jsonl.gz"
        is_known = plugins is not None and searched is not None
        shared = Path(config.cache_dir).expanduser() / "demonstrations" / own.name
        path = shared if is_known and not own.exists() else own
        parts = path.with_name(f"{key}.parts")

        def make() -> Demonstrations:
            return demonstrations.collect(source, **asking, seed=config.seed, parts=parts)

        found = demonstrations.cached(path, make, tokenizer, if_searches_failed=own)
        if ranks.is_first():
            shutil.rmtree(parts, ignore_errors=True)
        self.origins.append(hash_of(source.fingerprint))
        self._sampled_tokens[key] = found.num_sampled_tokens if source.by_model else 0
        if source.by_model and networks.reads_otherwise:  # the policy learns to write behind its own prompts
            prompts = encode_prompts(networks.tokenizer, [one.prompt for one in found.trajectories])
            found.trajectories = [
                replace(one, prompt_ids=ids) for one, ids in zip(found.trajectories, prompts, strict=True)
            ]
        return found


def without_failed_searches(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Leave out groups in which a failed search ended an episode: nobody knows whether it would have been right.

    A group goes as a whole, since algorithms compare its members and count on all of them.
    """
    failed = {one.group_id for one in trajectories if one.error is not None}
    return [one for one in trajectories if one.group_id not in failed]


def _question_id(trajectory: Trajectory) -> str:
    return trajectory.turns[-1].info["question_id"]


def _check_sampling(config: RunConfig, stages: Sequence[Algorithm]) -> None:
    """Refuse a temperature without a gradient, and draws that leave tokens out.

    Policy gradients are taken of the full distribution.
    """
    if not config.rollout.temperature > 0:
        raise ConfigurationError(
            f"Losses are at the temperature of the rollouts, and rollout.temperature={config.rollout.temperature} has "
            "no gradient; train with one above 0. python -m algorithms.evaluate takes other values."
        )
    top_p, top_k = config.rollout.top_p, config.rollout.top_k
    for stage in stages:
        is_gradient = type(stage).estimate_advantages is not Algorithm.estimate_advantages
        if is_gradient and "policy" in stage.trains_on and (top_p < 1 or top_k):
            raise ConfigurationError(
                f"{stage.name} estimates gradients of the policy's full distribution, and rollout.top_p={top_p}, "
                f"rollout.top_k={top_k} would leave tokens out of its rollouts; set rollout.top_p=1 and "
                "rollout.top_k=0 to train. python -m algorithms.evaluate takes other values."
            )


def _report_shortage(
    config: RunConfig, stages: Sequence[Algorithm], index: int, found: Demonstrations, source: str
) -> None:
    """Warn that an algorithm has fewer demonstrations than wanted.

    Raises:
        ConfigurationError: The algorithm has no demonstrations, and no stage follows.
    """
    settings: Any = stages[index].config
    count = len(found.trajectories)
    place = "algo" + ".warm_start" * (len(stages) - 1 - index)
    name = stages[index].name
    asked = f"{count} of {found.num_asked} training questions"
    right = f"the {source} was right on {asked}"
    message = right if settings.correct_only else f"the {source} answered {asked} without a malformed turn"
    message += f", and {found.num_wanted} demonstrations are wanted (num_demonstrations)"
    if found.dropped:
        message += "; dropped: " + ", ".join(f"{reason} {value:g}" for reason, value in sorted(found.dropped.items()))
    limit = settings.num_demonstrations * settings.max_questions_per_demonstration
    more = "give more training questions"
    if found.num_asked >= limit:
        more = f"ask more ({place}.max_questions_per_demonstration, now {settings.max_questions_per_demonstration})"
    other = "a teacher that knows the task" if source == "teacher" else "another demonstrations.source"
    remedy = f"{more}, or choose {other}"
    if settings.correct_only:
        remedy += f", or keep wrong answers too ({place}.correct_only=false)"
    if 2 * found.dropped.get("malformed", 0) > found.num_asked and config.env.get("prompt") == "bare":
        remedy = f"tell it the protocol (env.prompt=search_r1), {remedy}"
    if CUT_OFF in found.dropped:
        remedy = f"let replies be longer (rollout.max_new_tokens, now {config.rollout.max_new_tokens}), {remedy}"
    if count:
        warnings.warn(f"{name}: {message}; training goes on with {count}. To have more, {remedy}.", stacklevel=3)
    elif index < len(stages) - 1:
        warnings.warn(f"{name} is SKIPPED: {message}. To have it, {remedy}.", stacklevel=3)
    else:
        raise ConfigurationError(f"{name} has nothing to train on: {message}. To have some, {remedy}.")


def choose_source(algorithm: Algorithm, progress: Progress, rng: np.random.Generator) -> str:
    """Return what `Algorithm.source` answers, if there is such a source.

    Raises:
        ConfigurationError: `trains_on` does not declare the source, or there is nothing to replay yet.
    """
    source = algorithm.source(progress, rng)
    if source not in algorithm.trains_on:
        raise ConfigurationError(
            f"{algorithm.name}: source returned {source!r}, which is none of what trains_on declares: "
            f"{', '.join(sorted(algorithm.trains_on))}."
        )
    if source == "replay" and not progress.replay_size:
        raise ConfigurationError(
            f"{algorithm.name}: source returned 'replay' in step {progress.step}, with nothing kept to replay; "
            f"let the policy play first, and set replay_capacity (now {algorithm.replay_capacity})."
        )
    return source


def draw_questions(seed: int, stage: int, start: int, count: int, num_questions: int) -> list[int]:
    """Take questions `start` to `start + count` of an endless series of passes over the dataset, each shuffled."""
    questions: list[int] = []
    while len(questions) < count:
        epoch, offset = divmod(start + len(questions), num_questions)
        order = seeding.rng(seed, stage, "questions", epoch).permutation(num_questions)
        questions += order[offset : offset + count - len(questions)].tolist()
    return questions
