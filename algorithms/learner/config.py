"""Settings of the learner and of the kinds of algorithms, without the libraries that obey them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.settings import COUNT, FRACTION, Allowed, above, at_least, check_settings, one_of, or_none

#: Metadata of a field whose setting says how a run is carried out, and does not change its results but for rounding.
WITHOUT_EFFECT = {"without_effect": True}
LOSS_REDUCTIONS = ("token-mean", "seq-mean", "constant")
SHARDINGS = ("none", "fsdp2")
PRECISIONS = ("auto", "float32", "bfloat16", "float64")
#: Conditions that a demonstration may have to meet.
FILTERS = ("correct", "well_formed", "length")
CRITICS = ("separate", "shared")
#: The target of adapters that stands for every linear layer but the LM head.
ALL_LINEAR = "all-linear"
#: Whom a KL penalty may pull towards, and what the names of its figures in `NEEDS` and `Batch` begin with.
ANCHORS = {"reference": "ref", "teacher": "teacher"}


def working_dtype(precision: str) -> str:
    """Name of the dtype of weights, stored log-probabilities and losses, whatever a network computes in.

    Args:
        precision: One of `PRECISIONS`.
    """
    return "float64" if precision == "float64" else "float32"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak learning rate.
        betas: Decay of the running mean and of the running square.
        weight_decay: Decoupled weight decay of matrices only. The reference codes of PPO and TAID decay biases and
            norms too.
        warmup_fraction: Share of the steps with a linear warm-up, in [0, 1]; the first step is not at zero.
        schedule: "constant" after the warm-up, or "cosine" down to zero.
        max_grad_norm: Bound of the gradient's norm.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_fraction: float = 0.0
    schedule: str = "constant"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, above(0), "learning_rate", "max_grad_norm")
        check_settings(self, at_least(0), "weight_decay")
        check_settings(self, FRACTION, "warmup_fraction")
        check_settings(self, one_of(("constant", "cosine")), "schedule")
        check_settings(
            self, Allowed("two numbers in [0, 1)", lambda value: len(value) == 2 and min(value) >= 0), "betas"
        )
        check_settings(self, Allowed("two numbers in [0, 1)", lambda value: max(value) < 1), "betas")


@dataclass(kw_only=True)
class AlgorithmConfig:
    """Settings that every algorithm has. An algorithm's own config adds to them.

    Attributes:
        batch_size: Trajectories per step.
        num_minibatches: Optimizer steps per pass over the batch.
        num_epochs: Passes over one batch; 1 for a batch drawn from stored trajectories.
        loss_reduction: "token-mean": the mean over all model-written tokens of a minibatch. "seq-mean": the mean over
            trajectories of each one's token mean. "constant": the mean over trajectories of each one's token sum
            divided by `reduction_length`, so that no length is favoured (Dr. GRPO, arXiv:2503.20783).
        reduction_length: Tokens; read only where `loss_reduction` is "constant".
        optimizer: Optimizer of the policy.
        warm_start: Settings (with `name`) of the algorithm whose result this one starts from; None: the raw model.
    """

    batch_size: int = 64
    num_minibatches: int = 1
    num_epochs: int = 1
    loss_reduction: str = "token-mean"
    reduction_length: int = 128
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: Any = None

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "batch_size", "num_minibatches", "num_epochs", "reduction_length")
        limit = self.batch_size
        check_settings(self, Allowed(f"at most batch_size ({limit})", lambda value: value <= limit), "num_minibatches")
        check_settings(self, one_of(LOSS_REDUCTIONS), "loss_reduction")


@dataclass(kw_only=True)
class DemonstrationsConfig:
    """Where demonstrations come from.

    Attributes:
        source: "teacher" (the teacher model), "file", "expert" (a script, for questions with gold passages) or
            "endpoint" (an OpenAI-compatible server); plug-ins may register more. "auto": the teacher if the run has
            one, else the expert.
        path: The file; only for "file".
        url: Address of the server up to the version, such as `http://127.0.0.1:8000/v1`; only for "endpoint".
        model: What the server calls the model; only for "endpoint".
        num_parallel: Most requests under way at once, at most `num_envs`; only for "endpoint".
        api_key_variable: Name of the environment variable that holds the server's key.
        num: Takes the place of `num_demonstrations`; None: `num_demonstrations` counts.
        filters: What a demonstration must be: "correct", "well_formed" (no malformed turn), "length" (no action longer
            than `rollout.max_new_tokens`). A demonstration without an answer is always dropped.
    """

    source: str = "auto"
    path: str | None = None
    url: str | None = None
    model: str | None = None
    num_parallel: int = 32
    api_key_variable: str = "OPENAI_API_KEY"
    num: int | None = None
    filters: list[str] = field(default_factory=lambda: list(FILTERS))

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT), "num")
        check_settings(self, COUNT, "num_parallel")
        allowed = f"a list of some of {', '.join(FILTERS)}"
        check_settings(self, Allowed(allowed, lambda value: set(value) <= set(FILTERS)), "filters")


@dataclass(kw_only=True)
class DemonstrationConfig(AlgorithmConfig):
    """Settings of an algorithm that trains on stored demonstrations. The run collects these as they say.

    Attributes:
        demonstrations: Where they come from.
        num_demonstrations: Trajectories to collect.
        max_questions_per_demonstration: The teacher is asked at most this many times `num_demonstrations` training
            questions. Training goes on with those that it got right.
        correct_only: Keep correct trajectories only; False: all with an answer and no malformed turn (DGPO's ablation
            "all TGO").
        hand_over_exact_match: End the stage as soon as exact match on the development questions reaches this; None:
            never.
    """

    demonstrations: DemonstrationsConfig = field(default_factory=DemonstrationsConfig)
    num_demonstrations: int = 400
    max_questions_per_demonstration: int = 4
    correct_only: bool = True
    hand_over_exact_match: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        num, default = self.demonstrations.num, type(self).__dataclass_fields__["num_demonstrations"].default
        if num is not None and self.num_demonstrations not in (num, default):
            raise ConfigurationError(
                f"num_demonstrations={self.num_demonstrations} and demonstrations.num={num} say different things; set "
                "one of them."
            )
        self.num_demonstrations = self.num_demonstrations if num is None else num
        if self.correct_only and "correct" not in self.demonstrations.filters:
            raise ConfigurationError(
                f"demonstrations.filters={self.demonstrations.filters} keeps wrong answers, and correct_only=true does "
                "not; set correct_only=false, or add correct to the filters."
            )
        counts = ("num_demonstrations", "max_questions_per_demonstration")
        check_settings(self, COUNT, *counts)
        check_settings(self, or_none(Allowed("in (0, 1]", lambda value: 0 < value <= 1)), "hand_over_exact_match")


@dataclass(kw_only=True)
class PolicyGradientConfig(AlgorithmConfig):
    """Settings that all policy-gradient methods share; the defaults are those measured on the bundled tiny world.

    Attributes:
        steps: Training steps, a fresh rollout each.
        anchor: Whom the KL penalty pulls towards: "reference", the policy at the start of the stage, or "teacher".
        kl_coef: Weight of the KL penalty. The penalty is a sum over tokens, so compare the logged variances of penalty
            and reward. After 200 demonstrations on the tiny world, the penalty's is 0.09 times the reward's at 0.001,
            2 times at 0.005, and 37 times at 0.02.
        kl_estimator: How the KL is estimated from the sampled token: "k1" (signed), "k2" or "k3", see
            `ops.kl_estimate`.
        kl_clip: Bound of the estimate's absolute value at each token, in nats; None: no bound.
        clip_range: How far below 1 the policy ratio earns something. If `clip_range_high` is None, also how far above.
        clip_range_high: How far above 1 the policy ratio earns something. A value above `clip_range` lets rare tokens
            grow faster ("clip higher", arXiv:2503.14476).
        entropy_coef: Weight of the entropy bonus.
        importance_sampling_cap: Truncated importance sampling (Ionides, 2008; for rollouts by another engine or
            precision, Yao et al., 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). Each
            token's advantage is multiplied by min(p_learner / p_sampled, cap), where p_learner is the probability that
            the training pass gives the token before the update, and also the denominator of the policy ratio. The cap
            there is 2. It costs one more forward pass. None: p_learner is taken to be p_sampled.
    """

    batch_size: int = 96
    num_minibatches: int = 3
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, betas=(0.9, 0.99), warmup_fraction=0.05, schedule="cosine"
        )
    )
    steps: int = 150
    anchor: str = "reference"
    kl_coef: float = 0.001
    kl_estimator: str = "k1"
    kl_clip: float | None = None
    clip_range: float = 0.2
    clip_range_high: float | None = None
    entropy_coef: float = 0.001
    importance_sampling_cap: float | None = None

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """How far below and above 1 the policy ratio earns something."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, above(0), "steps", "clip_range")
        check_settings(self, or_none(above(0)), "kl_clip", "clip_range_high", "importance_sampling_cap")
        check_settings(self, one_of(ANCHORS), "anchor")
        check_settings(self, at_least(0), "kl_coef", "entropy_coef")


@dataclass(kw_only=True)
class CriticConfig(AlgorithmConfig):
    """Settings of an algorithm that needs values.

    Attributes:
        critic_optimizer: Optimizer of the critic.
        critic_warmup_steps: Steps in which only the critic learns, before the policy's schedule begins.
        value_clip_range: Bound of a value's distance to the value before the update.
    """

    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1.5e-3, betas=(0.9, 0.99), warmup_fraction=0.05)
    )
    critic_warmup_steps: int = 6
    value_clip_range: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(0), "critic_warmup_steps")
        check_settings(self, above(0), "value_clip_range")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): the policy's weights stay as they are, and matrices beside them learn.

    Policy, critic and reference share the weights. Without dropout, what is sampled is what is trained on.

    Attributes:
        rank: Width of the adapters; None: there are none, and all weights are trained.
        alpha: What an adapter adds to its layer is multiplied by `alpha / rank`.
        targets: Names of the linear layers that get an adapter, such as `q_proj`; "all-linear": all but the LM head.
    """

    rank: int | None = None
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT), "rank")
        check_settings(self, above(0), "alpha")
        check_settings(self, Allowed("a list of one or more names", lambda value: len(value) > 0), "targets")


@dataclass(kw_only=True)
class LearnerConfig:
    """How the training step uses the machine, and where the critic lives.

    Attributes:
        precision: Precision of the computation, rollouts included: "float32", "bfloat16" (autocast) or "auto". "auto"
            is bfloat16 on a GPU, and on a CPU with matrix units for it (AMX) if the model has at least ten million
            parameters; else float32. Weights and optimizer are float32. Rollouts under bfloat16 read a copy of the
            linear layers, which takes half of their memory and is refreshed after every update. "float64" is for
            proofs: everything from the rollout to the optimizer is float64, so that the order of sums hardly shows.
        micro_batch_tokens: Tokens, padding included, that go through the backbone at once. A start that trajectories
            have in common counts once where it is computed once.
        chunk_tokens: Model-written tokens that go through the LM head at once. A chunk of logits takes this times the
            vocabulary times 4 bytes, and about four chunks exist at the peak. On a CPU, a chunk of a large vocabulary
            has fewer (52 at 152k), because that is faster.
        gradient_checkpointing: Keep one activation per layer and compute the others again in the backward pass.
        critic: "separate": a network of its own; "shared": a head on the policy's backbone.
        value_coef: Weight of the value loss in the gradient of a shared backbone. The head learns from all of it.
        sharding: "none": each process holds the networks whole. "fsdp2": of several processes, each holds a share of
            policy, critic, reference and teacher, for models that fit no GPU in full. The policy is gathered whole to
            write with. A single process has nothing to share.
    """

    precision: str = "auto"
    micro_batch_tokens: int = field(default=4096, metadata=WITHOUT_EFFECT)
    chunk_tokens: int = field(default=1024, metadata=WITHOUT_EFFECT)
    gradient_checkpointing: bool = field(default=False, metadata=WITHOUT_EFFECT)
    critic: str = "separate"
    value_coef: float = 0.5
    sharding: str = field(default="none", metadata=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, one_of(PRECISIONS), "precision")
        check_settings(self, one_of(CRITICS), "critic")
        check_settings(self, one_of(SHARDINGS), "sharding")
        if self.sharding == "fsdp2" and self.critic == "shared":
            raise ConfigurationError(
                "learner.sharding=fsdp2 can't gather a critic inside the policy; choose learner.critic=separate."
            )
        check_settings(self, COUNT, "micro_batch_tokens", "chunk_tokens")
        check_settings(self, at_least(0), "value_coef")
