"""The memory and time that one stage of a run takes, from the shapes of its models.

What memory counts, for P parameters of a trained network: weights 4 P bytes, AdamW 8 P, gradients 4 P, and while AdamW
steps another 4 P; frozen networks 4 P, a teacher in bfloat16 2 P. With adapters (`model.lora`), P counts these alone,
and the weights below are frozen and exist once for policy, critic and reference. Under bfloat16 the matrices of the
computing network exist a second time, 2 bytes each, and those of a policy that plays once more, from the first rollout
on. With `learner.sharding=fsdp2` each of N devices holds 1/N of all that is held, the policy whole to write with, and
what is gathered while it computes: the embeddings and two layers. Time for sending weights is not counted.
"""

from __future__ import annotations

from typing import Any

from algorithms.learner.algorithm import Algorithm, DemonstrationConfig, Role
from algorithms.learner.scoring import chunk_tokens
from algorithms.learner.teacher_states import MAX_BYTES
from algorithms.training.hardware import Device
from algorithms.training.model_shapes import Shape
from algorithms.training.settings import RunConfig
from algorithms.training.trial import Trial

#: Lengths of an episode in the paper's setting, where the limits allow them: tokens in all, and written by the model.
_TOKENS, _WRITTEN = 1450, 250
#: Share of a device's matrix products that training reaches.
_USE = 0.4
#: Chunks of logits that exist at the peak; bytes of a sampled row of logits for each id.
_CHUNKS, _SAMPLING = 4, 12


class StagePlan:
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
        """Bytes of a teacher's weights."""
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
        return _timetable(steps, phases, once)

    def time_as_tried(self, trial: Trial, number: int) -> dict[str, Any]:
        """Steps, and seconds by phase, of the stage with this number in a trial."""
        tried, once = dict(trial.stages[number] or {}), {}
        tokens = tried.pop("tokens", 0.0)
        if self.num_demonstrations:
            once["demonstrations"] = trial.demonstration_s * self.num_demonstrations
        if self.states_of_teacher():
            once["teacher reads demonstrations"] = trial.reading_s * self.num_demonstrations
        steps = self.stage.num_steps(self.num_demonstrations) if tried else 0
        return _timetable(steps, tried, once) | {"tokens of a step": round(tokens)}


def _timetable(steps: int, phases: dict[str, float], once: dict[str, float]) -> dict[str, Any]:
    return {
        "steps": steps,
        "seconds of a step": {name: round(seconds, 2) for name, seconds in phases.items()},
        "seconds once": {name: round(seconds, 2) for name, seconds in once.items()},
        "hours": (steps * sum(phases.values()) + sum(once.values())) / 3600,
    }
