"""The training step: score a batch, let the algorithm turn it into losses per token, and apply them.

The learner never asks which algorithm it serves. It keeps the backbone's hidden states only at the positions that
predict model-written tokens. It takes these through the LM head in chunks, forward and backward at once, and the logits
of a chunk through the losses in blocks. So one chunk of logits exists at a time, and never a [B, T, V] tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import checkpointing, decoder, ops, ranks, sharding
from algorithms.learner.algorithm import NEEDS, Algorithm, Role
from algorithms.learner.config import LearnerConfig, PolicyGradientConfig
from algorithms.learner.figures import Figures
from algorithms.learner.networks import Critic
from algorithms.learner.optimizer import Optimizer
from algorithms.learner.scoring import Part, Scorer, chunk_tokens, gather_tokens, slice_tokens, slices
from algorithms.learner.short_gradients import logprobs_and_entropy
from algorithms.learner.teacher_states import TeacherStates
from algorithms.learner.transfers import send
from algorithms.learner.types import Batch, Tokens

_Losses = dict[str, Tensor]

#: Mean distance, in nats, between the log-probabilities of sampling and of training from which the former are replaced.
_MAX_LOGPROB_GAP = 5e-3


class Learner:
    """Trains a policy, and a critic if there is one, by the hooks of an algorithm.

    Args:
        algorithm: The hooks that say what a batch teaches.
        policy: The network being trained.
        critic: Needed by algorithms that read "values".
        reference: Frozen; needed by algorithms that read anything that begins with "ref_".
        teacher: Frozen; needed by algorithms that read anything that begins with "teacher_".
        config: How to use the machine.
        total_steps: Training steps of the whole run, for the schedules.
        vocab_size: Logits beyond it are cut off, in every network, before any softmax.
        temperature: Temperature of the rollouts; the logits of every network are divided by it.

    Raises:
        ConfigurationError: A network that the algorithm needs is missing, or a setting can't work.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        policy: PreTrainedModel,
        *,
        critic: Critic | None = None,
        reference: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        config: LearnerConfig,
        total_steps: int,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> None:
        self.algorithm, self.policy = algorithm, policy
        # Any: `_check_settings` makes sure that each is present where the algorithm's `needs` let it be used.
        self.critic: Any = critic
        self.reference: Any = reference
        self.teacher: Any = teacher
        self.config = config
        self.scorer = Scorer(
            vocab_size=vocab_size,
            temperature=temperature,
            precision=config.precision,
            micro_batch_tokens=config.micro_batch_tokens,
            chunk_tokens=chunk_tokens(config.chunk_tokens, vocab_size, on_cpu=policy.device.type == "cpu"),
            in_step=sharding.is_sharded(policy),
            reads_once=decoder.is_readable(policy.base_model) and not config.gradient_checkpointing,
        )
        self._check_settings()
        self.shared_critic = critic is not None and critic.shared
        self.step, self.total_steps = 0, total_steps
        self.teacher_states: TeacherStates | None = None
        settings: Any = algorithm.config
        self.importance_cap = settings.importance_sampling_cap if isinstance(settings, PolicyGradientConfig) else None
        self.rescores = self.importance_cap is not None
        self.critic_optimizer: Optimizer | None = None
        if critic is not None:
            self.critic_optimizer = Optimizer("critic", critic.parameters(), settings.critic_optimizer, total_steps)
        self.policy_optimizer = Optimizer(
            "policy",
            policy.parameters(),
            algorithm.config.optimizer,
            total_steps,
            first_step=0 if critic is None else settings.critic_warmup_steps,
        )
        if config.gradient_checkpointing:
            for network in self._trained():
                checkpointing.enable(network)

    def score(self, batch: Batch, *, fresh: bool = True) -> None:
        """Fill in the values, log-probabilities and divergences of a batch, each only if the algorithm needs it.

        Divergences are from the policy as it is now. On fresh rollouts this is the policy that sampled.

        Args:
            batch: The batch. If `rescores`, its `old_logprobs` become those that the policy has here, and
                `sampled_logprobs` keeps those of the rollout.
            fresh: Whether the policy as it is now has sampled the batch.
        """
        needs, policy, only = self.algorithm.needs, self.policy, self.algorithm.anchored(batch)
        rescores = fresh and self.rescores
        if rescores:
            batch.sampled_logprobs = batch.old_logprobs
        if rescores and self.shared_critic:
            batch.old_logprobs, batch.values = self.scorer.logprobs_and_values(policy, self.critic, batch)
        else:
            if rescores:
                batch.old_logprobs = self.scorer.logprobs(policy, batch)
            if "values" in needs:
                batch.values = self.scorer.values(self.critic, batch)
        for name, network in (("ref", self.reference), ("teacher", self.teacher)):
            is_teacher = name == "teacher"
            if f"{name}_kl" in needs:
                divergence, logprobs = self.scorer.kl_and_logprobs(policy, network, batch, is_teacher, only)
                setattr(batch, f"{name}_kl", divergence)
                setattr(batch, f"{name}_logprobs", logprobs)
            elif f"{name}_logprobs" in needs:
                setattr(batch, f"{name}_logprobs", self.scorer.logprobs(network, batch, is_teacher, only))

    @torch.no_grad()
    def validate(self, batch: Batch) -> float:
        """Mean loss of the policy per model-written token, without a step."""
        total, num_tokens = 0.0, 0
        for part in self.scorer.split(batch):
            tokens = gather_tokens(part.micro, part.rows, *part.at)
            hidden = self.scorer.hidden(self.policy, part.micro, *part.at)
            for _, told, _ in self._blocks(part, tokens, hidden):
                total += float(self.algorithm.token_loss(told).sum()) * part.counts
                num_tokens += len(told.ids) * part.counts
            sharding.release(self.policy, self.teacher)
        total, num_tokens = map(sum, zip(*ranks.gathered((total, num_tokens)), strict=True))
        return total / num_tokens

    def update(self, batch: Batch, rng: np.random.Generator, *, fresh: bool = True) -> dict[str, float]:
        """Take one training step on a scored batch, from its rewards to the optimizer.

        Args:
            batch: A batch that `score` has filled in. This adds `token_rewards`, `advantages` and `returns`.
            rng: Draws the minibatches.
            fresh: Whether the policy as it is now has sampled the batch. If not, figures that compare with the sampling
                policy are left out.

        Returns:
            Figures by name, without the prefix `train/`. Losses are means over minibatches; figures of tokens are means
            over tokens. `rollout/logprob_gap_mean` and `_max` are how far the log-probabilities of sampling are from
            those here, before the first step on the batch, over the tokens of the first minibatch [nats].

        Raises:
            FloatingPointError: A loss or a gradient is not finite; that network is as it was before that minibatch.
            ConfigurationError: The batch can't be split as configured.
        """
        config: Any = self.algorithm.config
        self._check_batch(batch)
        batch.token_rewards = self.algorithm.shape_rewards(batch)
        if (estimate := self.algorithm.estimate_advantages(batch)) is not None:
            batch.advantages, batch.returns = estimate
            if self.importance_cap is not None and batch.sampled_logprobs is not None:
                batch.advantages = batch.advantages * ops.truncated_importance(
                    batch.old_logprobs, batch.sampled_logprobs, self.importance_cap
                )
        self._zero_grad()
        figures = Figures(fresh)
        trains_policy = self.step >= self.policy_optimizer.first_step
        device = batch.input_ids.device
        with checkpointing.active(self._trained() if self.config.gradient_checkpointing else []):
            for _ in range(config.num_epochs):
                for rows in np.array_split(rng.permutation(len(batch)), config.num_minibatches):
                    self._step_minibatch(batch, send(torch.from_numpy(np.sort(rows)), device), trains_policy, figures)
        metrics = {**figures.means(), "learning_rate": self.policy_optimizer.learning_rate(self.step)}
        if batch.values is not None and batch.returns is not None:
            metrics["explained_variance"] = ops.explained_variance(batch.values, batch.returns, batch.response_mask)
        if estimate is not None:
            self._mind_gap(metrics.get("rollout/logprob_gap_mean", 0.0))
        metrics.update(self.algorithm.step_metrics(batch))
        self.algorithm.after_step({**metrics, "progress": self.step / self.total_steps})
        self.step += 1
        return metrics

    def _mind_gap(self, gap: float) -> None:
        """Replace the log-probabilities of sampling from the next batch on, if they are not those of this policy."""
        if gap > _MAX_LOGPROB_GAP and not self.rescores:
            self.rescores = True
            warnings.warn(
                f"The log-probabilities of sampled tokens differ from those of the training pass by {gap:.2g} nats on "
                f"average (at most {_MAX_LOGPROB_GAP:g} are put up with). From the next step on, the old "
                "log-probabilities are computed by the training pass, at the price of one more forward pass. "
                "learner.precision=float32 makes the gap small; algo.importance_sampling_cap=2 corrects for it.",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """State that a later `update` depends on, beside the networks' weights; its tensors in the first process."""
        critic = None if self.critic_optimizer is None else self.critic_optimizer.state_dict()
        return {
            "step": self.step,
            "rescores": self.rescores,
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": critic,
            "algorithm": self.algorithm.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if (state["critic_optimizer"] is None) != (self.critic_optimizer is None):
            raise ConfigurationError("The saved state and this run must both have a critic or both have none.")
        self.step = state["step"]
        self.rescores |= state.get("rescores", False)  # earlier versions saved none
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])

    # --- one minibatch -----------------------------------------------------------------------------------------------

    def _step_minibatch(self, batch: Batch, rows: Tensor, trains_policy: bool, figures: Figures) -> None:
        """Accumulate the gradients of a minibatch's micro-batches, critic first, and step."""
        minibatch = batch.select(rows)
        num_tokens = minibatch.response_mask.sum(dim=1).to(minibatch.old_logprobs.dtype)
        if not num_tokens.any():
            raise ConfigurationError(
                f"A minibatch of {len(minibatch)} trajectories has no model-written token; lower num_minibatches."
            )
        weights = self._weights(num_tokens)
        if self.critic_optimizer is not None and not (self.shared_critic and trains_policy):
            losses = self._accumulate(minibatch, rows, weights, self._critic_backward, ["value_loss"], figures)
            figures.add_whole("critic_grad_norm", self.critic_optimizer.apply(losses["value_loss"], self.step))
            self._zero_grad()
        if trains_policy:
            names = ["loss", "value_loss"] if self.shared_critic else ["loss"]
            losses = self._accumulate(minibatch, rows, weights, self._policy_backward, names, figures)
            figures.add_whole("grad_norm", self.policy_optimizer.apply(losses["loss"], self.step))
            if self.critic_optimizer is not None and self.shared_critic:
                figures.add_whole("critic_grad_norm", self.critic_optimizer.apply(losses["value_loss"], self.step))
            self._zero_grad()
        figures.first_minibatch = False

    def _weights(self, num_tokens: Tensor) -> Tensor:
        """Weight of each trajectory's tokens in the loss of a minibatch, [b], from their numbers [b]."""
        config = self.algorithm.config
        if config.loss_reduction == "seq-mean":
            return 1.0 / (len(num_tokens) * num_tokens.clamp(min=1))
        if config.loss_reduction == "constant":
            return torch.full_like(num_tokens, 1.0 / (len(num_tokens) * config.reduction_length))
        return (1.0 / num_tokens.sum()).expand(len(num_tokens))

    def _zero_grad(self) -> None:
        self.policy_optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()

    def _accumulate(
        self,
        minibatch: Batch,
        rows: Tensor,
        weights: Tensor,
        backward: Callable[..., _Losses],
        names: Sequence[str],
        figures: Figures,
    ) -> _Losses:
        """Run a backward pass per micro-batch, and return the losses of the whole minibatch by these names."""
        totals = {name: weights.new_zeros(()) for name in names}
        for part in self.scorer.split(minibatch):
            tokens = gather_tokens(part.micro, rows[part.rows], *part.at)
            own = weights[part.rows][part.at[0]] * part.counts
            for name, loss in backward(part, tokens, own, figures if part.counts else Figures(False)).items():
                totals[name] += loss
        for name, total in totals.items():
            figures.add_whole(name, ranks.summed(total))
        return totals

    def _critic_backward(self, part: Part, tokens: Tokens, weights: Tensor, figures: Figures) -> _Losses:
        tokens.values = self.scorer.values_at(self.critic, part.micro, *part.at)
        loss = (self.algorithm.value_loss(tokens) * weights).sum()
        loss.backward()
        return {"value_loss": loss.detach()}

    def _policy_backward(self, part: Part, tokens: Tokens, weights: Tensor, figures: Figures) -> _Losses:
        """Run the backbone once, head and losses forward and backward chunk by chunk, then the backbone backward."""
        hidden = self.scorer.hidden(self.policy, part.micro, *part.at)
        gradient = torch.empty_like(hidden)
        losses: _Losses = {}
        for block, told, states in self._blocks(part, tokens, hidden, gradient):
            for name, loss in self._block_backward(told, states, weights[block], figures).items():
                losses[name] = losses.get(name, 0) + loss
        hidden.backward(gradient)
        sharding.release(self.teacher)
        return losses

    def _block_backward(self, told: Tokens, states: Tensor, weights: Tensor, figures: Figures) -> _Losses:
        losses = {"loss": (self.algorithm.token_loss(told) * weights).sum()}
        objective = losses["loss"]
        if self.shared_critic:
            # The same states, of whose gradient the backbone gets `value_coef`; the head, with its own optimizer, all.
            told.values = self.critic.read(states.detach().lerp(states, self.config.value_coef))
            losses["value_loss"] = (self.algorithm.value_loss(told) * weights).sum()
            objective = objective + losses["value_loss"]
        objective.backward()
        self._measure(told, figures)
        return {name: loss.detach() for name, loss in losses.items()}

    def _blocks(
        self, of: Part, tokens: Tokens, hidden: Tensor, gradient: Tensor | None = None
    ) -> Iterator[tuple[slice, Tokens, Tensor]]:
        """Yield for each block which tokens it has, what a loss may read, and their hidden states.

        With `gradient`, [n, d], the caller takes the backward pass of each block, which ends at the block's logits and
        hidden states. From there the gradient goes through the head, a chunk at once, and into `gradient`.
        """
        teacher_hidden = None
        if "teacher_logits" in self.algorithm.needs:
            with torch.no_grad():
                teacher_hidden = self._teacher_hidden(of)
        for chunk in slices(len(hidden), self.scorer.chunk_tokens):
            leaf = hidden[chunk].detach().requires_grad_()
            logits, of_teacher = self.scorer.logits(self.policy, leaf), None
            if teacher_hidden is not None:
                with torch.no_grad():
                    of_teacher = self.scorer.logits(self.teacher, teacher_hidden[chunk])
            for rows in slices(len(leaf), self.scorer.block_tokens):
                block = slice(chunk.start + rows.start, chunk.start + rows.stop)
                told, of_policy = slice_tokens(tokens, block), logits[rows].detach().requires_grad_()
                self._fill_in_logits(told, of_policy, None if of_teacher is None else of_teacher[rows])
                yield block, told, leaf[rows]
                if gradient is not None:
                    assert of_policy.grad is not None
                    logits.detach()[rows] = of_policy.grad  # nobody reads these logits again
                # The caller still holds the last block while the logits of the next chunk are computed.
                told.logits = told.teacher_logits = told.logprobs = told.entropy = None
            if gradient is not None:
                logits.backward(logits.detach())
                assert leaf.grad is not None
                gradient[chunk] = leaf.grad

    def _teacher_hidden(self, of: Part) -> Tensor:
        states = self.teacher_states
        if states is not None and of.micro.first_states is not None:
            return sharding.gathered(self.teacher, lambda: states.of(of))  # whose head is read next
        return self.scorer.hidden_of_teacher(self.teacher, of.micro, *of.at)

    def _fill_in_logits(self, tokens: Tokens, logits: Tensor, teacher_logits: Tensor | None) -> None:
        needs = self.algorithm.needs
        tokens.logprobs, entropy = logprobs_and_entropy(logits, tokens.ids)
        tokens.entropy = entropy if "entropy" in needs else entropy.detach()
        if "logits" in needs:
            tokens.logits = logits
        tokens.teacher_logits = teacher_logits

    @torch.no_grad()
    def _measure(self, tokens: Tokens, figures: Figures) -> None:
        """Figures over tokens. Those that compare with the sampling policy need it to be this policy."""
        assert tokens.logprobs is not None
        assert tokens.entropy is not None
        figures.add("entropy", tokens.entropy)
        if not figures.fresh:
            return
        difference = tokens.logprobs - tokens.old_logprobs
        if figures.first_minibatch:
            sampled = tokens.old_logprobs if tokens.sampled_logprobs is None else tokens.sampled_logprobs
            figures.add_with_largest("rollout/logprob_gap", (tokens.logprobs - sampled).abs())
        figures.add("approx_kl", ops.kl_estimate(tokens.old_logprobs, tokens.logprobs, "k3"))
        if isinstance(config := self.algorithm.config, PolicyGradientConfig):
            ratio, (low, high) = difference.exp(), config.clip_ranges
            figures.add("ratio", ratio)
            figures.add("clip_fraction", ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype))

    def _trained(self) -> list[nn.Module]:
        return [self.policy] if self.critic is None or self.shared_critic else [self.policy, self.critic]

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        name, needs = type(self.algorithm).__name__, self.algorithm.needs
        networks = {Role.CRITIC: self.critic, Role.REFERENCE: self.reference, Role.TEACHER: self.teacher}
        for need in sorted(needs):
            role = NEEDS[need]
            if role is not None and networks[role] is None:
                raise ConfigurationError(f"{name} needs {need}, so the learner needs a {role}; none was given.")
        if self.critic is not None and Role.CRITIC not in self.algorithm.roles:
            raise ConfigurationError(f"{name} does not read values, but a critic was given; leave it out.")
        if not self.scorer.temperature > 0:
            raise ConfigurationError(f"The temperature of training must be above 0, got {self.scorer.temperature}.")

    def _check_batch(self, batch: Batch) -> None:
        num_minibatches = self.algorithm.config.num_minibatches
        if len(batch) < num_minibatches:
            raise ConfigurationError(
                f"A batch of {len(batch)} trajectories can't be split into num_minibatches={num_minibatches}; raise"
                " batch_size or lower num_minibatches."
            )
        largest = int(batch.written_ids.masked_fill(~batch.response_mask, 0).max())
        if largest >= self.scorer.vocab_size:
            raise ConfigurationError(
                f"The batch holds token id {largest}, written by a model, but the vocabulary shared by all"
                f" networks has {self.scorer.vocab_size} entries; check that all have the same tokenizer."
            )
