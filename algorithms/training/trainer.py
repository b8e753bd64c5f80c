"""A run from beginning to end: stage after stage of training, checkpoints on the way, and resuming from any of them."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from algorithms.learner import ranks, seeding, sharding
from algorithms.learner.adapters import trained_state
from algorithms.learner.algorithm import Algorithm, CriticConfig, DemonstrationConfig, Progress, Role
from algorithms.learner.collate import collate
from algorithms.learner.networks import Critic, declared_config, pad_id
from algorithms.learner.teacher_states import TeacherStates
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch, Trajectory
from algorithms.rollout.attention_kernels import in_words
from algorithms.rollout.cached_engine import check_context
from algorithms.rollout.replay import Replay
from algorithms.rollout.tokenization import encode_prompts
from algorithms.training import checkpoint, evaluation
from algorithms.training.agent_files import described
from algorithms.training.batches import Sources, choose_source, without_failed_searches
from algorithms.training.build import Environments, Networks, build_stages
from algorithms.training.costs import cost_metrics, speeds, spend, timed
from algorithms.training.episode_figures import trajectory_metrics
from algorithms.training.file_locks import make_cache, require_writable
from algorithms.training.fingerprints import of_questions
from algorithms.training.host_memory import StepMemory
from algorithms.training.position import Position
from algorithms.training.presets import toy_settings
from algorithms.training.rehearsal import rehearse
from algorithms.training.run_files import CONFIG_FILE, differences
from algorithms.training.run_logger import RunLogger, SilentLogger
from algorithms.training.settings import RunConfig, settings_with_effect
from algorithms.training.trajectory_samples import is_due, token_figures, write_check, write_sample


class Trainer:
    """Trains the chain of algorithms of a configuration.

    Args:
        config: The run's settings.
        run_dir: Where everything is written. If it holds checkpoints, training goes on after the newest.
        most_steps: Steps after which a stage ends that would take more; None: it takes all.

    Attributes:
        stages: The algorithms, first to last.
        position: Where the run stands.
    """

    def __init__(self, config: RunConfig, run_dir: Path, most_steps: int | None = None) -> None:
        self.config, self.run_dir, self._most_steps = config, run_dir, most_steps
        self.stages = build_stages(config.algo)
        self._resume_from = ranks.decided(lambda: checkpoint.recovered(run_dir))
        self.networks = Networks(config, self._model_steps())
        self.environments = Environments(config, self.networks.tokenizer)
        self._refuse_what_fails_late()
        self.position, self._saved_data = Position(), dict[str, Any]()
        if self._resume_from is not None:
            self._take_position(self._resume_from)
        if config.learner.sharding == "fsdp2" and ranks.count() > 1:
            self.networks.shard_policy()
        if taught := [stage.name for stage in self.stages if Role.TEACHER in stage.roles]:
            if config.model.teacher is None:
                raise ConfigurationError(
                    f"{taught[0]} needs a teacher, and model.teacher is null; name a model, or choose another stage "
                    "(for a cold start without a teacher, algo.warm_start=sft)."
                )
            self.networks.teacher()
        self.sources = Sources(config, self.networks, self.environments, self.stages, run_dir)
        if self._resume_from is not None:
            self._require_same_data(self._resume_from)
        self._check_last_batches()

    def _refuse_what_fails_late(self) -> None:
        """Refuse now mistakes in settings and files that would otherwise end a run after hours."""
        if not self.config.evaluation.every:
            for stage in self.stages:
                if _hand_over(stage) is not None:
                    raise ConfigurationError(
                        f"hand_over_exact_match of {stage.name} looks at the checks on the dev split, and "
                        "evaluation.every=0 switches them off; give the number of steps between them."
                    )
        for stage in self.stages:
            rehearse(stage)
            _warn_of_critic_alone(stage)
        for split in ("train", "dev", "test"):
            self.environments.dataset(split)
        self.networks.player(self.networks.writer(), self.environments.envs("train"))
        if (teacher := self.networks.place_of_teacher) is not None:  # it plays at the end, in the evaluation
            name = f"model.teacher={self.config.model.teacher}"
            check_context(declared_config(teacher), self.config.rollout, name)
        if warning := toy_settings(self.config, self.stages, self.networks.policy.num_parameters()):
            warnings.warn(warning, stacklevel=2)
        cache_dir = Path(self.config.cache_dir).expanduser()
        try:
            make_cache(cache_dir)
            for kept in ("demonstrations", "evaluations"):
                require_writable(cache_dir / kept)
        except OSError as error:
            raise ConfigurationError(
                f"cache_dir={cache_dir} can't be written to ({error.strerror}); name another folder."
            ) from error

    def _model_steps(self) -> dict[str, int]:
        """The attribute `model_steps` of the networks that this run began with; empty for a new run."""
        if self._resume_from is None:
            return {}
        saved = checkpoint.read_trainer_state(self._resume_from).get("model_steps", {})  # earlier versions saved none
        try:
            return {role: int(step) for role, step in saved.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"Checkpoint {self._resume_from} holds no state of a run ({error!r}).") from error

    def _take_position(self, saved_in: Path) -> None:
        """Take over the position of a checkpoint, if it was saved with these settings.

        Raises:
            ConfigurationError: The settings were changed since.
            DataError: The checkpoint's state is not that of a run.
        """
        state = checkpoint.read_trainer_state(saved_in)
        try:
            self.position = Position(**state["position"])
            # Earlier versions saved neither.
            found = differences(state.get("settings", {}), self._settings())
            self._saved_data = dict(state.get("data", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"Checkpoint {saved_in} holds no state of a run ({error!r}).") from error
        if found:
            changed = "; ".join(f"{key} was {before} and is {now}" for key, before, now in found[:5])
            raise ConfigurationError(
                f"{self.run_dir / CONFIG_FILE} was changed since checkpoint {saved_in.name} was saved: {changed}. "
                f"Change it back to go on; or begin a new run from these weights: model.policy={saved_in}"
            )

    def _require_same_data(self, saved_in: Path) -> None:
        """Refuse to go on with other data than a checkpoint was trained on, where it says which."""
        saved = self._saved_data
        if changed := [what for what, hashed in self._data.items() if saved.get(what, hashed) != hashed]:
            raise ConfigurationError(
                f"{' and '.join(changed)} were changed since checkpoint {saved_in.name} was saved. Change them back to "
                f"go on; or begin a new run from these weights: model.policy={saved_in}"
            )

    @cached_property
    def _data(self) -> dict[str, Any]:
        """Hashes of what the run trains on, by what it is."""
        train = self.environments.dataset("train")
        passages = None if train.corpus is None else fingerprint(train.corpus)
        return {
            "The training questions": of_questions(train),
            "The passages": passages,
            "The demonstrations": self.sources.origins,
        }

    def _settings(self) -> dict[str, Any]:
        """The settings that have an effect on the results of the run."""
        return settings_with_effect(asdict(self.config))

    def _check_last_batches(self) -> None:
        """Refuse a last batch of a pass over stored trajectories that has fewer trajectories than minibatches."""
        for stage in self.sources.demonstrations:
            count, config = len(self.sources.to_train_on(stage)), stage.config
            last = count % config.batch_size or config.batch_size
            if count and last < config.num_minibatches:
                raise ConfigurationError(
                    f"{stage.name}: {count} demonstrations in batches of {config.batch_size} leave {last} for "
                    f"the last batch, which can't be split into num_minibatches={config.num_minibatches}; choose "
                    "another batch_size or lower num_minibatches."
                )

    def num_steps(self, stage: Algorithm) -> int:
        """Training steps of a stage that does not end early; 0 if it has nothing to train on."""
        return stage.num_steps(len(self.sources.to_train_on(stage)))

    def checkpoint_path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.run_dir / checkpoint.checkpoint_name(step)

    def _checks_at_end(self) -> float:
        """How many checks on the dev split the final evaluation is worth, at most: a part of it may be kept already."""
        num_test, num_dev = (len(self.environments.dataset(split)) for split in ("test", "dev"))
        questions = evaluation.questions_at_end(self.config, len(self.stages), num_test)
        return questions / min(self.config.evaluation.num_dev_questions, num_dev)

    def train(self) -> None:
        """Train all stages to their end. The teacher is out of memory afterwards."""
        total = sum(self.num_steps(stage) for stage in self.stages)
        with self._logger(total) as logger:
            stages = ", then ".join(f"{stage.name} ({self.num_steps(stage)} steps)" for stage in self.stages)
            logger.message(f"training: {stages}; written to {self.run_dir}")
            processes = f", {ranks.count()} processes" if ranks.count() > 1 else ""
            processes += ", each with a share of the networks (fsdp2)" if self.networks.is_sharded else ""
            chosen = f"{self.networks.precision} ({self.networks.precision_reason})"
            attention = in_words(self.networks.attention)
            logger.message(f"computing in {chosen} on {self.networks.device}{processes}, {attention}")
            if self._resume_from is not None:
                logger.message(f"resuming after step {self.position.step} of {total}")
            while self.position.stage < len(self.stages):
                self._train_stage(self.stages[self.position.stage], logger)
                self.position.next_stage()
        self.networks.release_teacher()

    def _logger(self, total: int) -> RunLogger:
        if not ranks.is_first():
            return SilentLogger()
        return RunLogger(
            self.run_dir,
            total,
            start_step=self.position.step,
            loggers=self.config.logger,
            settings=asdict(self.config),
            command=shlex.join(sys.argv),
            checks_at_end=self._checks_at_end(),
        )

    def _train_stage(self, algorithm: Algorithm, logger: RunLogger) -> None:
        total = self.num_steps(algorithm)
        if total == 0:
            return
        learner, memory = self._make_learner(algorithm, total), StepMemory()
        self._keep_teacher_states(learner)
        self.sources.replay = Replay(algorithm.replay_capacity)
        if self._resume_from is not None:
            self._load(self._resume_from, learner)
            self._resume_from = None
        while not self._stage_is_over(algorithm, total):
            metrics = self._validate(learner) if self.position.stage_step == 0 else {}
            metrics |= self._train_step(learner, total)
            memory.after_step()
            self.position.stage_step += 1
            metrics |= self._validate(learner) if self._is_end_of_pass(algorithm) else {}
            checks, probes = (
                is_due(every, self.position.stage_step, total)
                for every in (self.config.evaluation.every, self.config.probe_every)
            )
            if checks or probes:
                metrics |= self._check_on_dev(logger, self.config.probes if probes else (), steers=checks)
            logger.write(self.position.step, metrics | cost_metrics(self.position.costs), algorithm.name)
            is_due_anyway = self.position.stage_step % self.config.checkpoint_every == 0
            is_best = self.position.step in self.position.best_steps()
            if is_due_anyway or is_best or self._stage_is_over(algorithm, total):
                self._save(learner)

    def _load(self, saved_in: Path, learner: Learner) -> None:
        """Go on from a checkpoint. What was read is let go at the end: it is as large as the optimizers."""
        saved = checkpoint.load(saved_in, policy=self.networks.policy, critic=learner.critic)
        learner.load_state_dict(saved.learner)
        self.sources.replay.load_state_dict(saved.trainer["replay"])

    def _stage_is_over(self, algorithm: Algorithm, total_steps: int) -> bool:
        if self.position.stage_step >= min(total_steps, self._most_steps or total_steps):
            return True
        threshold = _hand_over(algorithm)
        reached = self.position.dev_exact_match
        return threshold is not None and reached is not None and reached >= threshold

    def _make_learner(self, algorithm: Algorithm, total_steps: int) -> Learner:
        """Make the learner of a stage, with the networks that its algorithm needs as they are at the stage's start."""
        roles, policy, placed = algorithm.roles, self.networks.policy, self.networks.placed
        is_shared = self.config.learner.critic == "shared"
        return Learner(
            algorithm,
            policy,
            critic=placed(Critic(self.networks.writer(), shared=is_shared)) if Role.CRITIC in roles else None,
            reference=placed(self._policy_at_stage_start()) if Role.REFERENCE in roles else None,
            teacher=placed(self.networks.teacher()) if Role.TEACHER in roles else None,
            config=replace(self.config.learner, precision=self.networks.precision),
            total_steps=total_steps,
            vocab_size=self.networks.vocab_size,
            temperature=self.config.rollout.temperature,
        )

    def _keep_teacher_states(self, learner: Learner) -> None:
        """Let the teacher read the demonstrations now, instead of in every pass over them."""
        stored = self.sources.to_train_on(learner.algorithm)
        if "teacher_logits" not in learner.algorithm.needs or not TeacherStates.fit(stored, learner.teacher):
            return
        with timed(self.position.costs, "score_s"):
            learner.teacher_states = TeacherStates(stored, self._collate, learner.scorer, learner.teacher)
        if self._resume_from is None:  # else the costs so far have it
            spend(self.position.costs, teacher_scored_tokens=float(learner.teacher_states.num_tokens))

    def _policy_at_stage_start(self) -> PreTrainedModel:
        start = self.position.stage_starts[-1]
        if start:
            checkpoint.require_whole(self.checkpoint_path(start))
        return self.networks.earlier_policy(self.checkpoint_path(start) if start else None)

    def _draw(self, algorithm: Algorithm, source: str) -> tuple[list[Trajectory], dict[str, float]]:
        """Draw the trajectories of the next step; also return figures of the rollout if there was one.

        Raises:
            RetrieverError: So many searches fail that too few trajectories are left.
        """
        stage, step = self.position.stage, self.position.stage_step
        if source == "teacher":
            return self.sources.demonstrated(algorithm, stage, step), {}
        if source == "replay":
            draw = seeding.rng(self.config.seed, stage, "replay", step)
            return self.sources.replay.sample(algorithm.config.batch_size, draw), {}
        trajectories, stats = self.sources.played(algorithm, stage, step)
        served = without_failed_searches(trajectories)
        if len(served) < algorithm.config.num_minibatches:
            raise RetrieverError(
                f"Failed searches leave {len(served)} of {len(trajectories)} episodes of training step "
                f"{self.position.step + 1} to learn from, fewer than the minibatches "
                f"(num_minibatches={algorithm.config.num_minibatches})."
            )
        self.sources.replay.add(served)
        spend(
            self.position.costs,
            rollout_s=stats.seconds,
            sampled_tokens=stats.sampled_tokens,
            episodes=len(trajectories),
            env_steps=sum(len(trajectory.turns) for trajectory in trajectories),
        )
        return served, trajectory_metrics(trajectories, stats)

    def _train_step(self, learner: Learner, total_steps: int) -> dict[str, float]:
        stage, step, replay = self.position.stage, self.position.stage_step, self.sources.replay
        progress = Progress(step, total_steps, len(replay), replay.is_full)
        source = choose_source(learner.algorithm, progress, seeding.rng(self.config.seed, stage, "source", step))
        costs, before = self.position.costs, dict(self.position.costs)
        trajectories, metrics = self._draw(learner.algorithm, source)
        # Sampling at another temperature than that of the losses is sampling from another policy.
        as_trained = learner.algorithm.sampling_temperature in (None, self.config.rollout.temperature)
        fresh = source == "policy" and as_trained
        with timed(costs, "score_s") as scoring:
            batch = self._collate(trajectories)
            if source == "teacher" and learner.teacher_states is not None:
                learner.teacher_states.mark(batch, trajectories)
            learner.score(batch, fresh=fresh)
        draw = seeding.rng(self.config.seed, "minibatches", self.position.step)
        with timed(costs, "update_s") as updating:
            figures = learner.update(batch, draw, fresh=fresh)
        tokens = float(batch.attention_mask.sum())
        spend(costs, **{f"{source}_batches": 1}, trained_tokens=tokens)
        if learner.teacher is not None and batch.first_states is None:
            read = learner.algorithm.anchored(batch)
            spend(costs, teacher_scored_tokens=float(batch.attention_mask[read].sum()))
        if is_due(self.config.evaluation.every, step + 1, total_steps):
            self._save_sample(trajectories, batch, learner)
        metrics |= {name if "/" in name else f"train/{name}": value for name, value in figures.items()}
        metrics |= {f"time/{name}": value for name, value in speeds(costs, before).items()}
        return metrics | scoring | updating

    def _save_sample(self, trajectories: Sequence[Trajectory], batch: Batch, learner: Learner) -> None:
        """Keep some of the trajectories that the present step has trained on."""
        dataset, tokenizer = self.environments.dataset("train"), self.networks.tokenizer
        with timed(self.position.costs, "samples_s"):
            figures = token_figures(batch, learner)
            write_sample(self.run_dir, self.position.step + 1, trajectories, dataset, tokenizer, figures)

    def _collate(self, trajectories: Sequence[Trajectory]) -> Batch:
        # The teacher may have no row for the policy's padding token.
        filler = min(pad_id(self.networks.tokenizer), self.networks.vocab_size - 1)
        tensors = filler, self.networks.device, self.networks.precision
        batch = collate(trajectories, *tensors)
        if self.networks.reads_otherwise:
            prompts = encode_prompts(self.networks.teacher_tokenizer, [one.prompt for one in trajectories])
            read = [replace(one, prompt_ids=ids) for one, ids in zip(trajectories, prompts, strict=True)]
            batch.read_by_teacher = collate(read, *tensors)
        return batch

    def _is_end_of_pass(self, algorithm: Algorithm) -> bool:
        """Whether the steps done are whole passes over the demonstrations."""
        per_pass = -(-len(self.sources.to_train_on(algorithm)) // algorithm.config.batch_size)
        return per_pass > 0 and self.position.stage_step % per_pass == 0

    def _validate(self, learner: Learner) -> dict[str, float]:
        """Measure the loss on the demonstrations held out, if there are any."""
        held_out = self.sources.held_out(learner.algorithm)
        if not held_out:
            return {}
        batch = self._collate(held_out)
        if learner.teacher is not None:
            spend(self.position.costs, teacher_scored_tokens=float(batch.attention_mask.sum()))
        loss = learner.validate(batch)
        learner.algorithm.after_validation(loss)
        return {"train/validation_loss": loss}

    def _check_on_dev(self, logger: RunLogger, probes: Sequence[Any], *, steers: bool) -> dict[str, float]:
        """Measure greedy figures and probes on a few questions of the dev split, and keep some of the transcripts.

        Only a check that `steers` is one of those that end a stage and choose the best step: how often probes look on
        changes nothing.
        """
        envs, tokenizer = self.environments.envs("dev"), self.networks.tokenizer
        count = min(self.config.evaluation.num_dev_questions, len(envs.dataset))
        with timed(self.position.costs, "dev_s") as clock:
            writer = self.networks.writer()
            player = self.networks.player(writer, envs, temperature=0.0)
            trajectories, _ = player.rollout(range(count), seed=(0,))
            metrics = write_check(self.run_dir, self.position.step, trajectories, envs.dataset, tokenizer, logger)
            if steers:
                self.position.note_check(metrics["dev/exact_match"])
            if probes:
                generator = self.networks.generator(writer, envs)
                arc, _ = evaluation.probe(generator, envs, trajectories, probes)
                metrics |= evaluation.arc_metrics(arc, "dev/arc")
        return metrics | clock

    def _save(self, learner: Learner) -> None:
        action_ends = self.environments.envs("train").metadata["action_ends"]
        policy, state, critic = self.networks.writer(), learner.state_dict(), learner.critic
        critic_state = None if critic is None else sharding.whole_state(trained_state(critic))

        def save() -> None:
            checkpoint.save(
                self.run_dir,
                self.position.step,
                policy=policy,
                tokenizer=self.networks.tokenizer,
                critic_state=critic_state,
                learner_state=state,
                trainer_state={
                    "position": asdict(self.position),
                    "replay": self.sources.replay.state_dict(),
                    "settings": self._settings(),
                    "data": self._data,
                    "model_steps": self.networks.model_steps,
                },
                agent=described(self.config, self.networks.precision, self.networks.vocab_size, action_ends),
                keep_last=self.config.keep_checkpoints,
                keep_steps=[*self.position.stage_starts, *self.position.best_steps()],
            )

        with timed(self.position.costs, "checkpoint_s"):
            ranks.decided(save)


def _hand_over(algorithm: Algorithm) -> float | None:
    """Exact match at which a stage ends early; None: it does not end early."""
    return algorithm.config.hand_over_exact_match if isinstance(algorithm.config, DemonstrationConfig) else None


def _warn_of_critic_alone(algorithm: Algorithm) -> None:
    """Warn of a stage that ends before its policy begins to train."""
    total = algorithm.num_steps(0)  # demonstrations are not there yet, and no critic is trained on them
    if isinstance(algorithm.config, CriticConfig) and 0 < total <= algorithm.config.critic_warmup_steps:
        warnings.warn(
            f"{algorithm.name} will leave the policy as it is: in all of its {total} steps only the critic learns "
            f"(critic_warmup_steps={algorithm.config.critic_warmup_steps}). Set critic_warmup_steps lower, or steps "
            "higher.",
            stacklevel=2,
        )
