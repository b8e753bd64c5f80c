"""Plans a run before it starts: memory, disk, tokens and time of every stage, from the shapes of its models.

All figures are arithmetic. Nothing is loaded, downloaded or trained. What it counts, for P parameters of a trained
network: weights 4 P bytes, AdamW 8 P, gradients 4 P, and while AdamW steps another 4 P; frozen networks 4 P, a teacher
in bfloat16 2 P. With adapters (`model.lora`), P counts these alone, and the weights below are frozen and exist once for
policy, critic and reference. Under bfloat16 the matrices of the computing network exist a second time, 2 bytes each,
and those of a policy that plays once more, from the first rollout on. With `learner.sharding=fsdp2` each of N devices
holds 1/N of all that is held, the policy whole to write with, and what is gathered while it computes: the embeddings
and two layers. Time for sending weights is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import write_whole
from algorithms.learner.algorithm import Algorithm, DemonstrationConfig, Role
from algorithms.learner.scoring import chunk_tokens
from algorithms.learner.teacher_states import MAX_BYTES
from algorithms.training.build import build_stages
from algorithms.training.hardware import GIB, Device, device_of
from algorithms.training.model_names import resolve_model
from algorithms.training.model_shapes import Shape, shape_of
from algorithms.training.settings import RunConfig

#: Lengths of an episode in the paper's setting, where the limits allow them: tokens in all, and written by the model.
_TOKENS, _WRITTEN = 1450, 250
#: Share of a device's matrix products that training reaches, and share of its memory that a plan may fill.
_USE, _FILL = 0.4, 0.92
#: Chunks of logits that exist at the peak; bytes of a sampled row of logits for each id.
_CHUNKS, _SAMPLING = 4, 12
_FILE = "preflight.json"


class _Stage:
    """The memory and time of one stage on each of N devices."""

    def __init__(
        self, stage: Algorithm, config: RunConfig, policy: Shape, teacher: Shape | None, device: Device
    ) -> None:
        self.stage, self.config, self.policy, self.device = stage, config, policy, device
        self.on_gpu = device.name != "cpu"
        self.half = config.learner.precision == "bfloat16" or (config.learner.precision == "auto" and self.on_gpu)
        self.count = config.hardware.count
        self.shares = self.count if config.learner.sharding == "fsdp2" else 1
        self.teacher = teacher if Role.TEACHER in stage.roles else None
        has_critic = Role.CRITIC in stage.roles and config.learner.critic == "separate"
        lora = config.model.lora
        adapter = policy.adapter(lora) if lora.rank is not None else None
        # Parameters that are trained, of policy and critic; those that both share; those of the reference alone.
        self.trained = policy.parameters if adapter is None else adapter
        self.critic = (policy.backbone if adapter is None else adapter) if has_critic else 0
        self.shared = 0 if adapter is None else policy.parameters
        self.reference = self.trained if Role.REFERENCE in stage.roles else 0
        self.has_half_teacher = config.model.teacher_dtype == "bfloat16" or (
            config.model.teacher_dtype == "auto" and self.on_gpu
        )
        # A row is never split, so a micro-batch holds the longest episode at least.
        self.micro = max(config.learner.micro_batch_tokens, config.rollout.max_tokens)
        self.chunk = chunk_tokens(config.learner.chunk_tokens, policy.vocab, on_cpu=not self.on_gpu)
        self.tokens = min(_TOKENS, config.rollout.max_tokens)
        self.written = min(_WRITTEN, self.tokens // 4)
        self.rows = config.num_envs  # in each process
        self.num_demonstrations, self.demonstrator = 0, None
        if isinstance(stage.config, DemonstrationConfig) and "teacher" in stage.trains_on:
            self.num_demonstrations = stage.config.num_demonstrations
            self.demonstrator = teacher if stage.config.demonstrations.source in ("teacher", "auto") else None

    def teacher_bytes(self, teacher: Shape | None) -> int:
        return 0 if teacher is None else teacher.parameters * (2 if self.has_half_teacher else 4)

    def held(self) -> dict[str, int]:
        """Bytes that the stage holds all the time."""
        trained = self.trained + self.critic
        whole = {
            "weights of policy and critic": 4 * (self.shared + trained),
            "optimizer": 8 * trained,
            "reference": 4 * self.reference,
            "teacher": self.teacher_bytes(self.teacher),
        }
        held = {name: -(-size // self.shares) for name, size in whole.items()}
        held["bfloat16 copy for rollouts"] = self.cast if "policy" in self.stage.trains_on else 0
        if size := self.states_of_teacher():
            held["teacher's states of demonstrations"] = size
        return held if self.shares == 1 else held | {"policy to write with": 4 * self.policy.parameters}

    def states_of_teacher(self) -> int:
        """Bytes of what the teacher has computed of demonstrations; 0 if it computes them anew."""
        if self.teacher is None or "teacher_logits" not in self.stage.needs:
            return 0
        size = self.num_demonstrations * self.written * self.teacher.hidden * (2 if self.half else 4)
        return size if size <= MAX_BYTES else 0

    def gathered(self) -> dict[str, int]:
        """Bytes of the units of the policy that are whole while it trains."""
        outer = self.policy.parameters - self.policy.matrices
        layers = 2 * self.policy.matrices // self.policy.layers
        return {} if self.shares == 1 else {"gathered units": 4 * (outer + layers)}

    @property
    def cast(self) -> int:
        """Bytes of the policy's linear layers in bfloat16; 0 under float32."""
        return 2 * (self.policy.matrices + self.policy.embedding) if self.half else 0

    def activations(self) -> int:
        """Bytes kept for the backward pass of a micro-batch, in the layers."""
        shape, element = self.policy, 2 if self.half else 4
        attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        # Norms and residuals are float32; the feed-forward part keeps gate, up, their product and the activation.
        layer = 4 * 6 * shape.hidden + element * (attention + 4 * shape.intermediate)
        kept = 4 * shape.hidden if self.config.learner.gradient_checkpointing else layer
        return self.micro * (shape.layers * kept + layer)

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes of each phase beside what is held."""
        policy = self.policy
        gradients = {"gradients": 4 * (self.trained + self.critic) // self.shares}
        found = {
            "backward": {
                **gradients,
                **self.gathered(),
                "activations": self.activations(),
                "logits": _CHUNKS * self.chunk * policy.vocab * 4,
                "bfloat16 copies": self.cast,
            },
            "optimizer step": {**gradients, "temporaries": 4 * self.trained // self.shares},
        }
        if "policy" in self.stage.trains_on:
            found["rollout"] = self._playing(policy)
        return found

    def _playing(self, shape: Shape) -> dict[str, int]:
        cache = self.rows * self.config.rollout.max_tokens * shape.kv_bytes(2 if self.half else 4)
        return {"key-value cache": cache, "sampling": self.rows * shape.vocab * _SAMPLING}

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of everything, by phase."""
        held, teacher = self.held(), self.demonstrator
        phases = {name: {**held, **parts} for name, parts in self.phases().items()}
        if teacher is not None:
            weights = {"weights of policy and critic": 4 * (self.shared + self.trained)}
            asked = weights | {"teacher": self.teacher_bytes(teacher)}
            phases = {"demonstrations": asked | self._playing(teacher), **phases}
        return phases

    # Time

    def forward_s(self, shape: Shape, episodes: float) -> float:
        """Seconds of a forward pass over episodes, shared by the devices."""
        attention = 2 * shape.layers * shape.heads * shape.head_dim * self.tokens
        work = episodes * (self.tokens * (2 * shape.matrices + attention) + self.written * 2 * shape.embedding)
        return work / (self.device.flops * _USE * self.count)

    def play_s(self, shape: Shape, element: int, episodes: float) -> float:
        """Seconds to play episodes: reading them, and a decode step for every token of a row."""
        rows = min(self.rows, -(-episodes // self.count))
        read = element * (shape.matrices + shape.embedding) + rows * self.tokens * shape.kv_bytes(element)
        steps = episodes / self.count * self.written / rows
        return self.forward_s(shape, episodes) + steps * max(self.device.decode_s, read / self.device.bandwidth)

    def time(self) -> dict[str, Any]:
        """Steps, and seconds by phase."""
        config, element = self.stage.config, 2 if self.half else 4
        steps = self.stage.num_steps(self.num_demonstrations)
        phases: dict[str, float] = {}
        if "policy" in self.stage.trains_on:
            phases["rollout"] = self.play_s(self.policy, element, config.batch_size)
        # What the teacher reads once, it need not read in a step; where the policy plays, too, there is more to read.
        reads_once = self.states_of_teacher() > 0
        scored = [] if self.teacher is None or (reads_once and "policy" not in self.stage.trains_on) else [self.teacher]
        scored += [self.policy] * (bool(self.reference) + bool(self.critic))
        phases["score"] = sum(self.forward_s(shape, config.batch_size) for shape in scored)
        # A forward pass, and two backward: one of them for the gradients of weights, which frozen ones need not.
        passes = (4 if self.config.learner.gradient_checkpointing else 3) - (1 if self.shared else 0)
        trained = 2 if self.critic else 1
        phases["update"] = passes * trained * config.num_epochs * self.forward_s(self.policy, config.batch_size)
        once: dict[str, float] = {}
        if self.demonstrator is not None:
            element = 2 if self.has_half_teacher else 4
            once["demonstrations"] = self.play_s(self.demonstrator, element, self.num_demonstrations)
        if self.teacher is not None and reads_once:
            once["teacher reads demonstrations"] = self.forward_s(self.teacher, self.num_demonstrations)
        return {
            "steps": steps,
            "seconds of a step": {name: round(seconds, 2) for name, seconds in phases.items()},
            "seconds once": {name: round(seconds, 2) for name, seconds in once.items()},
            "hours": (steps * sum(phases.values()) + sum(once.values())) / 3600,
        }


def plan(config: RunConfig) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: The run's settings; `hardware` says for which machine.

    Returns:
        Plain data: `fits`, the memory of each phase of each stage for one device [GiB], what of it is too much and the
        smallest change that would do, disk, tokens and time.

    Raises:
        ConfigurationError: The shape of a model cannot be read, or the algorithm trains no language model.
    """
    policy = shape_of(resolve_model(config.model.policy, config.cache_dir))
    teacher = shape_of(resolve_model(config.model.teacher, config.cache_dir)) if config.model.teacher else None
    device, stages = device_of(config.hardware), build_stages(config.algo)

    def planned(settings: RunConfig) -> list[_Stage]:
        return [_Stage(stage, settings, policy, teacher, device) for stage in stages]

    made = planned(config)
    memory = _memory(made)
    needs, (where, phase) = _peak(memory)
    allowed = device.memory * _FILL
    found: dict[str, Any] = {
        "computed, not measured": True,
        "hardware": {"device": device.name, "count": config.hardware.count, "GiB each": round(device.memory / GIB, 1)},
        "models": {
            "policy": policy.parameters,
            "teacher": teacher.parameters if teacher else None,
            "trained": made[0].trained,
        },
        "assumed": {"tokens of an episode": made[0].tokens, "written by the model": made[0].written},
        "fits": needs <= allowed,
        "peak": {"GiB": round(needs / GIB, 2), "stage": where, "phase": phase, "allowed GiB": round(allowed / GIB, 2)},
        "memory of each device, GiB": _in_gib(memory),
        "time": {one.stage.name: one.time() for one in made},
        "disk": _disk(config, made),
    }
    found["hours"] = round(sum(stage["hours"] for stage in found["time"].values()), 3)
    found["trained tokens"] = sum(
        stage["steps"] * one.stage.config.batch_size * one.stage.config.num_epochs * one.written
        for stage, one in zip(found["time"].values(), made, strict=True)
    )
    if not found["fits"]:
        found["reason"] = _reason(memory, found)
        found["change"] = _change(config, planned, allowed)
    return found


def preflight(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Write the plan of a run to `preflight.json` and print its main lines.

    Raises:
        ConfigurationError: The run does not fit; the message says why and what would do.
    """
    found = plan(config)
    write_whole(run_dir / _FILE, json.dumps(found, indent=2).encode())
    hardware, peak = found["hardware"], found["peak"]
    print(
        f"Plan for {hardware['count']} x {hardware['device']} ({hardware['GiB each']} GiB each), computed and not "
        f"measured: {peak['GiB']} GiB at the peak ({peak['stage']}, {peak['phase']}), about {found['hours']:.2f} hours "
        f"of training, {found['disk']['GiB']} GiB of checkpoints. {run_dir / _FILE}"
    )
    if not found["fits"]:
        raise ConfigurationError(f"{found['reason']} {found['change']}")
    return found


def _memory(made: list[_Stage]) -> dict[str, dict[str, dict[str, int]]]:
    return {one.stage.name: one.memory() for one in made}


def _peak(memory: dict[str, dict[str, dict[str, int]]]) -> tuple[int, tuple[str, str]]:
    return max(
        (sum(parts.values()), (stage, phase)) for stage, phases in memory.items() for phase, parts in phases.items()
    )


def _in_gib(memory: Any) -> Any:
    if isinstance(memory, dict):
        return {name: _in_gib(value) for name, value in memory.items()}
    return round(memory / GIB, 3)


def _disk(config: RunConfig, made: list[_Stage]) -> dict[str, Any]:
    """The checkpoints: weights and optimizer of policy and critic; of every stage the last and the best one stay."""
    each = max(12 * (one.trained + one.critic) for one in made)
    count = (config.keep_checkpoints or 2) + 2 * len(made)
    free = shutil.disk_usage(Path.cwd()).free
    return {"GiB": round(each * count / GIB, 2), "checkpoints": count, "free GiB here": round(free / GIB, 1)}


def _reason(memory: dict[str, dict[str, dict[str, int]]], found: dict[str, Any]) -> str:
    peak = found["peak"]
    parts = sorted(memory[peak["stage"]][peak["phase"]].items(), key=lambda part: -part[1])[:3]
    what = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return (
        f"This run does not fit: stage {peak['stage']} needs {peak['GiB']} GiB on each device ({peak['phase']}: {what})"
        f", and {peak['allowed GiB']} of {found['hardware']['GiB each']} GiB can be filled."
    )


def _changes(config: RunConfig, chunk: int) -> Iterator[dict[str, Any]]:
    """Changes to try, where a chunk has so many tokens: first each alone, then each together with those before it."""
    learner, limit, rows = config.learner, config.rollout.max_tokens, config.num_envs
    found: list[tuple[str, Any]] = []
    if not learner.gradient_checkpointing:
        found.append(("learner.gradient_checkpointing", True))
    if learner.micro_batch_tokens > limit:
        found.append(("learner.micro_batch_tokens", limit))
    if chunk > 256:
        found.append(("learner.chunk_tokens", 256))
    while (rows := rows // 2) >= 8:
        found.append(("num_envs", rows))
    if learner.sharding == "none" and config.hardware.count > 1 and config.model.lora.rank is None:
        found.append(("learner.sharding", "fsdp2"))
    elif learner.sharding == "none" and learner.critic == "separate":
        found.append(("learner.critic", "shared"))
    yield from ({name: value} for name, value in found)
    yield from (dict(found[:count]) for count in range(2, len(found) + 1))


def _changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    of_learner = {name.removeprefix("learner."): value for name, value in settings.items() if name != "num_envs"}
    learner = dataclasses.replace(config.learner, **of_learner)
    return dataclasses.replace(config, learner=learner, num_envs=settings.get("num_envs", config.num_envs))


def _change(config: RunConfig, planned: Callable[[RunConfig], list[_Stage]], allowed: float) -> str:
    """The smallest change with which the run fits, in words."""
    words, needs = "", 0
    for settings in _changes(config, planned(config)[0].chunk):
        words = " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
        needs, _ = _peak(_memory(planned(_changed(config, settings))))
        if needs <= allowed:
            return f"It would fit, with {needs / GIB:.1f} GiB, with {words}."
    return (
        f"With {words} it would still need {needs / GIB:.1f} GiB: weights, gradients and optimizer take most of it. "
        "Train adapters (model.lora.rank=16), or take a smaller policy or a device with more memory."
    )
