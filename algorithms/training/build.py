"""From a configuration to the parts of a run: environments, networks and the chain of algorithms."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from gymnasium.vector import AutoresetMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, did_you_mean
from agentic_rag_env.terminal import print_line
from agentic_rag_env.vector import brings_questions
from algorithms.learner import adapters, ranks, sharding
from algorithms.learner.adapter_folders import find_adapter, require_adapter
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, OptimizerConfig
from algorithms.learner.config import DemonstrationsConfig, working_dtype
from algorithms.learner.networks import (
    Network,
    declared_vocab_size,
    freeze,
    load_model,
    load_tokenizer,
    logit_width,
    require_rows,
    shared_vocab_size,
    soften,
)
from algorithms.learner.precision import decided_precision
from algorithms.rollout.attention_kernels import attention_kernels
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.cuda_graphs import decided_recorder
from algorithms.rollout.engine import Engine
from algorithms.rollout.generator import Generator
from algorithms.rollout.kv_cache import check_cache
from algorithms.rollout.player import Player, TextEnvs
from algorithms.rollout.recorded_steps import Recorder
from algorithms.rollout.tokenization import PlainEncoder
from algorithms.training.agent_files import read_agent
from algorithms.training.checkpoint import checkpoint_name, find_problem
from algorithms.training.host_memory import give_back
from algorithms.training.model_names import is_run, resolve_model
from algorithms.training.run_files import SUMMARY_FILE
from algorithms.training.settings import RunConfig
from algorithms.training.tokenizer_pairs import reads_otherwise, require_same_opening, require_shared_texts


def build_stages(spec: Any) -> list[Algorithm]:
    """Build an algorithm and those that it starts from, in the order of training.

    Args:
        spec: A name, or a mapping with `name` and settings; its `warm_start` is such a spec or None.

    Returns:
        The algorithms with their names. A name that appears in the chain again gets a number.

    Raises:
        ConfigurationError: A warm start leads back to itself, or trains no language model.
    """
    stages: list[Algorithm] = []
    while spec is not None:
        if len(stages) > 8:
            raise ConfigurationError(f"warm_start of {spec!r} goes on without end; set warm_start=null somewhere.")
        stage = ALGORITHMS.build(_with_nested(spec))
        if not isinstance(stage, Algorithm):
            name = spec if isinstance(spec, str) else spec["name"]
            raise ConfigurationError(
                f"{name} trains no language model, so nothing can start from it; choose another warm_start."
            )
        stages.append(stage)
        spec = stage.config.warm_start
    stages.reverse()
    names: list[str] = []
    for stage in stages:
        name = next(name for name in ALGORITHMS.names() if ALGORITHMS.get(name).factory is type(stage))
        names.append(name)
        stage.name = f"{name}-{names.count(name)}" if names.count(name) > 1 else name
    return stages


class RunEnvs(TextEnvs, Protocol):
    """What a run needs of its environments, beside playing.

    Attributes:
        dataset: The questions, or the tasks of an environment that brings its own.
        retriever: The retriever; None where there is none.
        rules: The settings of search episodes; None for any other task.
        top_k: Most passages per search; 0 for any other task.
    """

    dataset: QuestionSet
    retriever: Any
    rules: Any
    top_k: int


class Environments:
    """The environments of a run, made when first asked for. Splits over one corpus share one retriever.

    An environment that brings its own questions is made without dataset, retriever and reward.

    Args:
        config: The run's settings.
        tokenizer: Counts the tokens of observation budgets.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._brings_questions = brings_questions(config.env)
        self._made: dict[str, RunEnvs] = {}
        self._datasets: dict[str, QuestionSet] = {}
        self._retrievers: dict[int, Any] = {}

    def dataset(self, split: str) -> QuestionSet:
        """The questions of a split."""
        if self._brings_questions:
            return self.envs(split).dataset
        if split not in self._datasets:
            self._datasets[split] = DATASETS.build({**self._config.dataset, "split": split})
        return self._datasets[split]

    def envs(self, split: str) -> RunEnvs:
        """The vector environment of a split."""
        if split not in self._made:
            parts = {"split": split} if self._brings_questions else self._parts(split)
            self._made[split] = ENVS.build(self._config.env, num_envs=self._config.num_envs, **parts)
        return self._made[split]

    def _parts(self, split: str) -> dict[str, Any]:
        """What an environment without questions of its own is made of."""
        dataset = self.dataset(split)
        corpus = id(dataset.corpus)
        if corpus not in self._retrievers:
            self._retrievers[corpus] = RETRIEVERS.build(self._config.retriever, corpus=dataset.corpus)
        return {
            "autoreset_mode": AutoresetMode.DISABLED,
            "dataset": dataset,
            "retriever": self._retrievers[corpus],
            "reward": self._config.reward,
            "tokenizer": PlainEncoder(self._tokenizer),
        }


#: Parameters from which a second thread pays. The operations of a smaller network are so short that the threads wait
#: for each other most of the time: for the bundled student, two take 1.5 times the processor time of one.
_MIN_THREADED_PARAMETERS = 5_000_000


def _found_models(config: RunConfig, begun_with: Mapping[str, int]) -> tuple[dict[str, str], dict[str, int]]:
    """Find the models of a run, by role.

    Args:
        config: The run's settings.
        begun_with: The second result at the time when the run began; empty for a new run.

    Returns:
        Folders or hub ids. And of those that are runs, the step of the checkpoint.
    """
    places, steps = {}, {}
    for role, name in (("policy", config.model.policy), ("teacher", config.model.teacher)):
        if name is None:
            continue
        run = Path(name).expanduser()
        if role in begun_with:
            places[role] = str(run / checkpoint_name(begun_with[role]))
            _require_there(Path(places[role]))
        else:
            places[role] = resolve_model(name, config.cache_dir)
        if is_run(run):
            steps[role] = int(Path(places[role]).name)
            if not (run / SUMMARY_FILE).is_file() and not begun_with:
                warnings.warn(
                    f"The run model.{role}={name} is not complete. This run reads its checkpoint {places[role]} to the "
                    "end, and fails there if that run has removed it meanwhile; copy the checkpoint and name the copy.",
                    stacklevel=4,
                )
    return places, steps


def _require_there(model: Path) -> None:
    if problem := find_problem(model) if model.is_dir() else "it is gone":
        raise DataError(
            f"This run began with the model {model}, which can't be used: {problem}. Put it back from a copy to go on; "
            "or begin a new run."
        )


class Networks:
    """The networks of a run: the policy always, the teacher only while somebody needs it.

    Args:
        config: The run's settings.
        model_steps: The attribute `model_steps` of a run that goes on, as its checkpoint holds it.

    Raises:
        ConfigurationError: A model is missing or broken, or the teacher's vocabulary is not the policy's.
        DataError: The model that a run began with is not there any more.

    Attributes:
        place_of_policy: Folder or hub id of the model that the run begins with.
        place_of_teacher: The same of the teacher; None if there is none.
        model_steps: Where `model.policy` or `model.teacher` names a run: the step of its newest checkpoint when this
            run began, by `policy` and `teacher`. The other run may go on training.
        device: Where the networks are: the first GPU if there is one, or this process's own of several.
        tokenizer: The policy's tokenizer.
        teacher_tokenizer: The teacher's tokenizer, which may have another chat template. Without a teacher, it is the
            policy's.
        policy: The network being trained, float32, or float64 if that is the precision. With `model.lora.rank` it has
            an adapter, and the rest of it is frozen.
        precision: Precision of the computation, "float32", "bfloat16" or "float64".
        precision_reason: Why it is that one, for people.
        attention: The kernels in which the policy's attention runs, see `attention_kernels`.
        cuda_graphs: Whether the policy's decode steps are CUDA graphs, and why, for people.
        vocab_size: Ids that policy and teacher have in common, and that both wrote in the runs that they come from.
    """

    def __init__(self, config: RunConfig, model_steps: Mapping[str, int] | None = None) -> None:
        self._config = config
        self.device = ranks.device()
        places, self.model_steps = ranks.decided(lambda: _found_models(config, model_steps or {}))
        policy, teacher = places["policy"], places.get("teacher")
        self.place_of_policy, self.place_of_teacher = policy, teacher
        self.tokenizer = load_tokenizer(policy)
        self.teacher_tokenizer = self.tokenizer if teacher is None else load_tokenizer(teacher)
        self.policy = self._trained_policy(policy)
        require_rows(self.tokenizer, logit_width(self.policy), config.model.policy)
        if teacher is not None:
            require_rows(self.teacher_tokenizer, declared_vocab_size(teacher), str(config.model.teacher))
            require_same_opening(self.tokenizer, self.teacher_tokenizer)
        # The processors of several machines may differ.
        decided = ranks.decided(lambda: decided_precision(config.learner.precision, self.policy))
        self.precision, self.precision_reason = decided
        self.attention = attention_kernels(self.policy, self.precision)
        self._recorders: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()
        if config.threads is None and self.policy.num_parameters() < _MIN_THREADED_PARAMETERS:
            torch.set_num_threads(1)
        self._agents = [agent for place in (policy, teacher) if place and (agent := read_agent(place))]
        self.vocab_size = min([self._shared_vocab_size(), *(agent.vocab_size for agent in self._agents)])
        self._teacher: PreTrainedModel | None = None
        self._teachers: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        _, self.cuda_graphs = self._recorder(self.policy)

    def load(self, path: str) -> PreTrainedModel:
        """A model in the precision of the policy's weights, from a folder or a hub id."""
        return load_model(path, device=self.device, dtype=working_dtype(self._config.learner.precision))

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the policy alone, and of what is `placed`."""
        return sharding.is_sharded(self.policy)

    def shard_policy(self) -> None:
        """Keep a share of the policy for training, and a whole copy to write with."""
        self._writer = copy.deepcopy(self.policy).requires_grad_(False)
        self.policy = sharding.shard(self.policy)

    def placed(self, network: Network) -> Network:
        """A network that is scored with or trained beside the policy: sharded if the policy is. It can't write then."""
        return sharding.shard(network) if self.is_sharded and not sharding.is_sharded(network) else network

    def writer(self) -> PreTrainedModel:
        """The policy as it is now, whole. All processes call this at once."""
        if not self.is_sharded:
            return self.policy
        sharding.copy_weights(self.policy, self._writer)
        return self._writer

    def _trained_policy(self, path: str) -> PreTrainedModel:
        """The policy as a run begins: a saved adapter is trained further, or is a part of the weights."""
        if self._config.model.lora.rank is None:
            return self.load(path)
        saved = find_adapter(path)
        base = path if saved is None else saved.base
        policy = adapters.add_adapter(self.load(base), self._config.model.lora, base, self._config.seed)
        if saved is not None:
            adapters.load_adapter(policy, saved)
        return policy

    def earlier_policy(self, folder: Path | None) -> PreTrainedModel:
        """The policy as it was, frozen. One with an adapter shares what is frozen in the policy.

        Args:
            folder: Folder of a checkpoint of this run; None: as the run began, while nothing is trained or loaded yet.
        """
        if not adapters.is_adapted(self.policy):
            return freeze(self.load(self.place_of_policy if folder is None else str(folder)))
        earlier = adapters.twin(self.policy)
        if folder is not None:
            adapters.load_adapter(earlier, require_adapter(folder))
        return freeze(earlier)

    def teacher(self) -> PreTrainedModel:
        """The frozen teacher at its temperature, loaded if it is not in memory.

        Raises:
            ConfigurationError: No teacher is configured, it can't be loaded, or it can't play.
        """
        if self._teacher is None:
            if self.place_of_teacher is None:
                raise ConfigurationError("This algorithm needs a teacher, and model.teacher is null; name a model.")
            teacher = load_model(self.place_of_teacher, device=self.device, dtype=self._teacher_dtype())
            temperature = self._config.model.teacher_temperature
            check_cache(teacher)  # also where it only scores: it plays at the end, in the evaluation
            self._teacher = freeze(teacher if temperature == 1 else soften(teacher, temperature))
            self._teachers.add(self._teacher)
        return self._teacher

    def _teacher_dtype(self) -> str:
        if self.precision == "float64":
            return "float64"
        said, on_cpu = self._config.model.teacher_dtype, self.device.type == "cpu"
        return ("float32" if on_cpu else "bfloat16") if said == "auto" else said

    def _shared_vocab_size(self) -> int:
        # This must not depend on whether the process ever loads the teacher. With kept demonstrations it may not.
        if self.place_of_teacher is None:
            return logit_width(self.policy)
        widths = (logit_width(self.policy), declared_vocab_size(self.place_of_teacher))
        shared = shared_vocab_size(self.tokenizer, self.teacher_tokenizer, *widths)
        require_shared_texts(self.tokenizer, self.teacher_tokenizer, shared)
        return shared

    @property
    def reads_otherwise(self) -> bool:
        """Whether policy and teacher need prompts of their own."""
        return reads_otherwise(self.tokenizer, self.teacher_tokenizer)

    def tokenizer_of(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """The tokenizer whose chat template a network reads."""
        return self.teacher_tokenizer if model in self._teachers else self.tokenizer

    def release_teacher(self) -> None:
        """Take the teacher out of memory, and give back what nobody holds any more."""
        self._teacher = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back()

    def teacher_in_memory(self) -> bool:
        """Whether any teacher that was ever loaded still exists, whoever holds it."""
        return len(self._teachers) > 0

    def player(self, model: PreTrainedModel, envs: TextEnvs, temperature: float | None = None) -> Player:
        """A player with a network, at the run's temperature or at another one."""
        engine = self._engine(model, envs, self._config.rollout.temperature if temperature is None else temperature)
        return self.player_of(engine, envs)

    def player_of(self, engine: Engine, envs: TextEnvs) -> Player:
        """A player with an engine; as many searches may fail as the run's settings allow."""
        return Player(engine, envs, self._config.max_retriever_error_fraction)

    def generator(self, model: PreTrainedModel, envs: TextEnvs) -> Generator:
        """A generator with a network. It continues prompts greedily, up to where an action of the environments ends."""
        return Generator(self._engine(model, envs, 0.0))

    def _engine(self, model: PreTrainedModel, envs: TextEnvs, temperature: float) -> Engine:
        ends = tuple(envs.metadata["action_ends"])
        for agent in [each for each in self._agents if each.action_ends != ends]:
            print_line(f"Actions end with {', '.join(ends)}; a model was trained with {', '.join(agent.action_ends)}.")
            self._agents.remove(agent)  # said once
        return CachedEngine(
            model,
            self.tokenizer_of(model),
            dataclasses.replace(self._config.rollout, temperature=temperature),
            num_rows=envs.num_envs,
            action_ends=envs.metadata["action_ends"],
            vocab_size=self.vocab_size,
            precision=self.precision,
            recorder=self._recorder(model)[0],
        )

    def _recorder(self, model: PreTrainedModel) -> tuple[Callable[[], Recorder] | None, str]:
        """What records a network's decode steps, decided once; and whether it does, for people."""
        if model not in self._recorders:
            setting = self._config.rollout.cuda_graphs
            recorder, reason = decided_recorder(setting, model, self.tokenizer_of(model), self.precision)
            said = f"{'yes' if recorder else 'no'} ({reason})"
            self._recorders[model] = recorder, said
            if setting != "off" and ranks.is_first():
                print_line(f"CUDA graphs for decode steps of {model.config.model_type}: {said}")
        return self._recorders[model]


#: Settings that are dataclasses, by the last word of their name.
_NESTED: dict[str, Any] = {"optimizer": OptimizerConfig, "demonstrations": DemonstrationsConfig}


def _with_nested(spec: Any) -> Any:
    """Turn the nested settings of a configuration from mappings into dataclasses.

    `demonstrations.num` wins over `num_demonstrations`, which a preset or `stages` may have brought.
    """
    if not isinstance(spec, Mapping):
        return spec
    settings = {
        key: _nested(key, value) if key.rpartition("_")[2] in _NESTED and isinstance(value, Mapping) else value
        for key, value in spec.items()
    }
    of_demonstrations = settings.get("demonstrations")
    if isinstance(of_demonstrations, DemonstrationsConfig) and of_demonstrations.num is not None:
        settings["num_demonstrations"] = of_demonstrations.num
    return settings


def _nested(key: str, settings: Mapping[str, Any]) -> Any:
    kind = _NESTED[key.rpartition("_")[2]]
    known = [each.name for each in dataclasses.fields(kind)]
    for name in settings:
        if name not in known:  # in a file of settings that was damaged or edited
            raise ConfigurationError(f"{key} has no setting {name!r}.{did_you_mean(name, known)}")
    return kind(**settings)
