"""Every setting of the commands: its type, its default and its meaning.

The parts of a run that have a registry (algorithms, environments, retrievers, datasets, rewards) bring dataclasses of
their own. Here they are mappings with a `name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes import DEFAULT_PROBES
from agentic_rag_env.registry import PROBES
from agentic_rag_env.settings import COUNT, FRACTION, Allowed, above, at_least, check_settings, one_of, or_none
from agentic_rag_env.vector import brings_questions
from algorithms.learner.config import WITHOUT_EFFECT, LearnerConfig, LoraConfig
from algorithms.rollout.config import RolloutConfig
from algorithms.training.hardware import HardwareConfig
from algorithms.training.loggers import LOGGERS

#: Types of the teacher's weights.
TEACHER_DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class ModelConfig:
    """Which networks a run uses.

    Attributes:
        policy: Start of the policy: a bundled name, a Hugging Face folder, a run directory (its newest checkpoint), a
            `.gguf` file, or a hub id.
        teacher: The teacher, named like the policy; None for no teacher.
        settings: Settings of a preset that suit the model, see `presets`. They are in the configuration already.
        teacher_temperature: The teacher's logits are divided by it everywhere: where it plays demonstrations, judges
            tokens, and is measured. Above 1, a teacher that makes no mistakes begins to make some.
        teacher_dtype: Type of the teacher's weights: "float32", "bfloat16" (half of the memory) or "auto": bfloat16 on
            a GPU, float32 on a CPU. With `learner.precision=float64` they are float64.
        lora: Adapters that are trained instead of the policy's weights.
    """

    policy: str = "tiny-student"
    teacher: str | None = "tiny-teacher"
    settings: dict[str, Any] = field(default_factory=dict, metadata=WITHOUT_EFFECT)
    teacher_temperature: float = 1.0
    teacher_dtype: str = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_settings(self, above(0), "teacher_temperature")
        check_settings(self, one_of(TEACHER_DTYPES), "teacher_dtype")


#: The default parts of a run, as in conf/config.yaml. The environment comes first: it may do without the others.
DEFAULT_PARTS = {"env": "agentic_rag", "dataset": "tiny", "retriever": "bm25", "reward": "exact_match"}
#: What questions are made of. An environment that brings its own has none of them.
QUESTION_PARTS = ("dataset", "retriever", "reward")


#: Which passages an evaluation shows; all but the first are names of probes.
CORPORA = ("own", "counterfactual", "shuffled")


@dataclass
class ScoringConfig:
    """How a model is measured.

    Attributes:
        num_questions: Number of questions, from the first one of the split on; None takes all of them.
        temperatures: Modes of decoding; 0 is greedy.
        corpus: "own"; or "counterfactual" or "shuffled" for one more row of probes: what the agent answers when the
            passages are changed, see `agentic_rag_env.probes.grounding`.
        seed: Seed of the sampled modes and of the bootstrap.
    """

    num_questions: int | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    corpus: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT, "all"), "num_questions")
        check_settings(
            self, Allowed("one or more numbers of at least 0", lambda value: value and min(value) >= 0), "temperatures"
        )
        check_settings(self, at_least(0), "seed")
        check_settings(self, one_of(CORPORA), "corpus")


@dataclass
class EvaluationConfig(ScoringConfig):
    """What a run measures at its end, and on the way.

    Attributes:
        num_questions: Test questions at the end; None takes all of them.
        every: Training steps between checks on the dev split; 0 for none.
        num_dev_questions: Questions of a check on the dev split.
    """

    num_questions: int | None = 600
    every: int = 20
    num_dev_questions: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(0), "every")
        check_settings(self, COUNT, "num_dev_questions")


@dataclass
class DemonstrationsConfig:
    """Settings of every stage that trains on demonstrations.

    Attributes:
        num: Demonstrations to collect; None: each stage's own `num_demonstrations`.
    """

    num: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT), "num")


@dataclass
class RunConfig:
    """Settings of a whole run.

    An environment that brings its own questions has neither dataset nor retriever nor reward: these are None.

    Attributes:
        seed: Seed of everything random but the evaluation.
        resume: Run directory to go on with; its own configuration is used.
        num_envs: Episodes played at once, in each process.
        max_retriever_error_fraction: Share of a rollout's episodes that a failed search may end; past it the run stops.
            Nothing is learned from these episodes, nor from others of their group.
        cache_dir: Folder that keeps demonstrations, and evaluations of models that other runs measure too, between
            runs.
        checkpoint_every: Training steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints are kept, besides the last and the best on the dev split of
            every stage; None: all.
        probes: ARC probes at the end, by name or as a mapping with `name` and settings; empty for none.
        probe_every: Training steps between probes on the questions of a check on the dev split; 0 for none.
        threads: CPU threads of each process; None: one for a policy below five million parameters, else PyTorch's
            choice.
        allow: Addresses and files outside of the run directory that the settings saved in `resume` may name.
        preflight: Write a plan of memory, disk, tokens and time to `preflight.json` instead of training. If this
            process can carry out the run, the times are those of three real steps of every stage.
        logger: Where the numbers go: "jsonl" (`metrics.jsonl`, which every run writes), "tensorboard", "wandb", or one
            of your own; by name, or as a mapping with `name` and settings. `resume` takes it from the command line.
    """

    algo: Any = MISSING
    env: Any = MISSING
    dataset: Any = None
    retriever: Any = None
    reward: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    demonstrations: DemonstrationsConfig = field(default_factory=DemonstrationsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    seed: int = 0
    resume: str | None = field(default=None, metadata=WITHOUT_EFFECT)
    num_envs: int = 96
    max_retriever_error_fraction: float = 0.2
    cache_dir: str = field(default="~/.cache/agentic_rag_env", metadata=WITHOUT_EFFECT)
    checkpoint_every: int = field(default=25, metadata=WITHOUT_EFFECT)
    keep_checkpoints: int | None = field(default=2, metadata=WITHOUT_EFFECT)
    probes: list[Any] = field(default_factory=lambda: list(DEFAULT_PROBES))
    probe_every: int = field(default=0, metadata=WITHOUT_EFFECT)
    threads: int | None = field(default=None, metadata=WITHOUT_EFFECT)
    allow: list[str] = field(default_factory=list, metadata=WITHOUT_EFFECT)
    preflight: bool = field(default=False, metadata=WITHOUT_EFFECT)
    logger: list[Any] = field(default_factory=lambda: ["jsonl", "tensorboard"], metadata=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, Allowed("in [0, 2**32)", lambda value: 0 <= value < 2**32), "seed")
        check_settings(self, COUNT, "num_envs", "checkpoint_every")
        check_settings(self, at_least(0), "probe_every")
        for probe in self.probes:
            PROBES.build(probe)  # finds a misspelled one before training
        for logger in self.logger:
            LOGGERS.build(logger)
        check_settings(self, FRACTION, "max_retriever_error_fraction")
        check_settings(self, or_none(COUNT), "threads", "keep_checkpoints")
        if self.learner.sharding == "fsdp2" and self.model.lora.rank is not None:
            raise ConfigurationError(
                "learner.sharding=fsdp2 can't share the weights below an adapter yet; leave out model.lora.rank, or "
                "learner.sharding: what an adapter trains is small."
            )
        if not isinstance(self.env, Mapping):
            return  # a name, or nothing yet: `complete` makes settings out of it, which come here again
        if brings_questions(self.env):
            self._refuse_parts()
        elif missing := [group for group in QUESTION_PARTS if getattr(self, group) is None]:
            raise ConfigurationError(f"env={self.env['name']} needs {', '.join(f'{group}=NAME' for group in missing)}.")

    def _refuse_parts(self) -> None:
        """Refuse what has no meaning beside an environment with questions of its own; only a split may be named."""
        for group in QUESTION_PARTS:
            given = [name for name in getattr(self, group) or () if (group, name) != ("dataset", "split")]
            if given:
                chosen = f"{group}={getattr(self, group)['name']}" if "name" in given else f"{group}.{given[0]}"
                raise ConfigurationError(
                    f"env={self.env['name']} brings its own questions, so {chosen} would have no effect; leave it out."
                )
        if self.evaluation.corpus != "own":
            raise ConfigurationError(
                f"env={self.env['name']} brings its own questions, and there are no passages for evaluation.corpus="
                f"{self.evaluation.corpus} to change; leave it out."
            )


@dataclass
class CheckpointConfig:
    """What the commands that use a checkpoint have in common.

    Attributes:
        checkpoint: A run directory, a Hugging Face folder, a `.gguf` file, a bundled name or a hub id.
        cache_dir: Folder that keeps what a `.gguf` file is converted to.
        threads: CPU threads; None: one for a model below five million parameters, else PyTorch's choice.
        allow: Addresses and files outside of the run directory that the settings saved in it may name.
    """

    checkpoint: str = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    retriever: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    cache_dir: str = "~/.cache/agentic_rag_env"
    threads: int | None = None
    allow: list[str] = field(default_factory=list)


@dataclass
class EvaluateConfig(CheckpointConfig):
    """Settings of `algorithms.evaluate`.

    `env`, `dataset`, `retriever`, `reward`, `rollout`, `evaluation` and `num_envs` are those of the run that the
    checkpoint comes from, and the precision is that in which it computed; a copy of the checkpoint's folder brings them
    in `agent.json`. Without either they are the defaults, with the prompt `search_r1` unless the model is a bundled
    one. A single setting changes one of them (`env.max_turns=2`), and a name replaces a whole part (`dataset=jsonl`).
    On another dataset `evaluation` and `num_envs` are the defaults, which measure all questions. `dataset.split`
    chooses the split of the questions, also where the environment brings them.

    Attributes:
        evaluation: How the model is measured, see `ScoringConfig`.
        num_envs: Episodes played at once; None: as in the run.
        max_retriever_error_fraction: Share of the episodes that a failed search may end; past it the evaluation stops.
        probes: ARC probes, by name or as a mapping with `name` and settings; empty for none.
    """

    reward: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    num_envs: int | None = None
    max_retriever_error_fraction: float = 0.2
    probes: list[Any] = field(default_factory=lambda: list(DEFAULT_PROBES))


@dataclass
class AskConfig(CheckpointConfig):
    """Settings of `algorithms.ask`.

    `env`, `dataset`, `retriever`, `rollout` and `learner` are as in `EvaluateConfig`, but the model decodes greedily.

    Attributes:
        question: A question in plain words; None: questions are typed one after the other.
    """

    question: str | None = None


def settings_without_effect(section: type = RunConfig, prefix: str = "") -> frozenset[str]:
    """Dotted names of the settings that say how a run is carried out and do not change results: `WITHOUT_EFFECT`."""
    found = set()
    for setting in dataclasses.fields(section):
        if setting.metadata.get("without_effect"):
            found.add(prefix + setting.name)
        elif dataclasses.is_dataclass(inner := setting.default_factory):
            found |= settings_without_effect(inner, f"{prefix}{setting.name}.")
    return frozenset(found)


def settings_with_effect(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a run, nested, without those that have no effect on its results."""
    left_out = settings_without_effect()
    return {
        name: settings_with_effect(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if prefix + name not in left_out
    }
