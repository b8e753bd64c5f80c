"""The mathematics of the zoo as pure tensor functions.

Everything is computed in log space and in the dtype that comes in, so float64 stays float64. All quantities are in
nats. A logit of minus infinity is a vocabulary entry that cannot be chosen: it has probability 0 and contributes 0,
and no function here answers NaN because of it, neither as a value nor as a gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.settings import FRACTION, check_value, one_of

# Under these names, too, because algorithms look for all mathematics here.
from algorithms.learner.credit import REWARD_SCALES as REWARD_SCALES
from algorithms.learner.credit import gae as gae
from algorithms.learner.credit import group_advantages as group_advantages
from algorithms.learner.credit import standardize as standardize

if TYPE_CHECKING:  # this module calls only methods of tensors, so settings can import it without loading torch
    from torch import Tensor

#: Estimates of the KL by name, each a function of the difference of the log-probabilities.
KL_ESTIMATORS = {
    "k1": lambda k1: k1,
    "k2": lambda k1: k1.square() / 2,
    "k3": lambda k1: (-k1).expm1() + k1.masked_fill(k1 == -math.inf, 0.0),  # not inf - inf
}

#: Bound of |log ratio| in the surrogate: exp(20) is far outside every clip range, and times 0 it is still a number.
MAX_LOG_RATIO = 20.0


def at_least_float32(tensor: Tensor) -> Tensor:
    """Turn what a network has computed into float32; float64 stays float64."""
    return tensor if tensor.element_size() == 8 else tensor.float()


# --- distributions ---------------------------------------------------------------------------------------------------


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities over the last dimension. A row without a finite logit is minus infinity throughout.

    Args:
        logits: [..., V].
    """
    log_p = logits.log_softmax(dim=-1)
    # A row without a finite logit is NaN throughout. To look at one column is cheaper than a pass over all logits.
    if not log_p[..., :1].isnan().any():
        return log_p
    empty = logits.amax(dim=-1, keepdim=True) == -math.inf
    return logits.masked_fill(empty, 0.0).log_softmax(dim=-1).masked_fill(empty, -math.inf)


def gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the given token in each row.

    Args:
        logits: [..., V].
        ids: [...] int64.

    Returns:
        [...] nats.
    """
    # This avoids the table of all log-probabilities, which autograd would keep for the backward pass.
    normalizer = logits.logsumexp(dim=-1)
    if (normalizer == -math.inf).any():
        return log_softmax(logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normalizer


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row, [..., V] to [...] nats; 0 for a row without a finite logit."""
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    if entropy.isfinite().all():  # else some log_p is minus infinity or NaN, and its product with 0 is NaN
        return entropy
    log_p = log_softmax(logits)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


# --- divergences: (student_logits, teacher_logits) [..., V] -> [...] nats --------------------------------------------


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student): the student must cover whatever the teacher does.

    Where the second distribution rules out what the first allows, this and every KL below is plus infinity and sends
    back no gradient.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], same shape.

    Returns:
        [...] nats, at least 0.

    Raises:
        ConfigurationError: The shapes differ.
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher): the student seeks a mode of the teacher. The arguments are those of `forward_kl`."""
    log_q, log_p = _log_probs(student_logits, teacher_logits)
    return _kl(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence (GKD, arXiv:2306.13649, eq. 1).

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, teacher p, student q. This formula tends to
    0 at both ends. There the function returns the limit of the formula divided by beta or 1 - beta.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], same shape.
        beta: Weight of the teacher, in [0, 1]; 0 is `forward_kl`, 1 is `reverse_kl`.

    Raises:
        ConfigurationError: beta is outside [0, 1], or the shapes differ.
    """
    check_value("beta", beta, FRACTION)
    log_q, log_p = _log_probs(student_logits, teacher_logits)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), teacher p, student q (DistiLLM, arXiv:2402.03898); at most -log(alpha).

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], same shape.
        alpha: Share of the teacher in the mixture, in [0, 1]; 0 is `forward_kl`.

    Raises:
        ConfigurationError: alpha is outside [0, 1], or the shapes differ.
    """
    check_value("alpha", alpha, FRACTION)
    log_q, log_p = _log_probs(student_logits, teacher_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p), teacher p, student q (DistiLLM, arXiv:2402.03898); at most -log(alpha).

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], same shape.
        alpha: Share of the student in the mixture, in [0, 1]; 0 is `reverse_kl`.

    Raises:
        ConfigurationError: alpha is outside [0, 1], or the shapes differ.
    """
    check_value("alpha", alpha, FRACTION)
    log_q, log_p = _log_probs(student_logits, teacher_logits)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def taid_kl(student_logits: Tensor, teacher_logits: Tensor, t: float) -> Tensor:
    """KL(p_t || q) with p_t = softmax((1 - t) s + t z), s held constant in it (TAID, arXiv:2501.16937).

    Args:
        student_logits: s, [..., V].
        teacher_logits: z, [..., V], same shape.
        t: Place of the target between student (0) and teacher (1), in [0, 1].

    Raises:
        ConfigurationError: t is outside [0, 1], or the shapes differ.
    """
    check_value("t", t, FRACTION)
    if t == 0:  # 0 times minus infinity would be NaN
        target = student_logits.detach()
    elif t == 1:
        target = teacher_logits
    else:
        target = (1 - t) * student_logits.detach() + t * teacher_logits
    return forward_kl(student_logits, target)


def _log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise ConfigurationError(
            f"student_logits and teacher_logits must have the same shape [..., V], got {tuple(student_logits.shape)} "
            f"and {tuple(teacher_logits.shape)}; cut both to the shared vocabulary first."
        )
    return log_softmax(student_logits), log_softmax(teacher_logits)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(dim=-1)
    if divergence.isfinite().all():
        return divergence
    # Some entry is ruled out by one of the two; only then are these masks worth their passes over the vocabulary.
    ruled_out = log_q == -math.inf
    log_ratio = (log_p - log_q).masked_fill(ruled_out | (p == 0), 0.0)
    infinite = (ruled_out & (p > 0)).any(dim=-1)
    return (p * log_ratio).sum(dim=-1).masked_fill(infinite, math.inf)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q)."""
    if weight == 0:
        return log_q
    if weight == 1:
        return log_p
    mixture = (log_p + math.log(weight)).logaddexp(log_q + math.log1p(-weight))
    if not mixture.numel() or mixture.amin() > -math.inf:
        return mixture
    # The gradient of logaddexp(-inf, -inf) is NaN.
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)
    return (log_p + math.log(weight)).logaddexp(log_q + math.log1p(-weight)).masked_fill(neither, -math.inf)


# --- policy gradients ------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: str, clip: float | None = None) -> Tensor:
    """Estimate KL(policy || other) from one token that the policy sampled (Schulman, joschu.net/blog/kl-approx.html).

    k1 = log policy - log other, k2 = k1^2 / 2 and k3 = exp(-k1) - 1 + k1. k1 and k3 are unbiased; k1 has a sign, k2 and
    k3 are at least 0. As a loss on fresh samples, k1 has no gradient on average, k2 has the gradient of
    KL(policy || other), and k3 that of KL(other || policy).

    Args:
        logprobs: [...] nats.
        other_logprobs: [...] nats, of the same tokens.
        estimator: "k1", "k2" or "k3".
        clip: Bound of the estimate's absolute value, which biases the estimate; None: no bound.

    Raises:
        ConfigurationError: The estimator has another name.
    """
    check_value("kl_estimator", estimator, one_of(KL_ESTIMATORS))
    difference = _difference(logprobs, other_logprobs)
    if clip is None:
        return KL_ESTIMATORS[estimator](difference)
    # The gradient of an estimate beyond its bound is 0, and 0 times what k3 would have there is NaN.
    return KL_ESTIMATORS[estimator](difference.clamp(min=-max(clip, MAX_LOG_RATIO))).clamp(-clip, clip)


def truncated_importance(logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(p / p_sampled, cap) (Ionides, "Truncated Importance Sampling", 2008).

    Args:
        logprobs: [...] nats, of the policy that the expectation is about.
        sampled_logprobs: [...] nats, of the same tokens under the policy that sampled.
        cap: The largest weight. It bounds the variance, and makes an estimate biased where it applies.
    """
    return _difference(logprobs, sampled_logprobs).exp().clamp(max=cap)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """PPO's pessimistic policy loss per token, to be minimized (arXiv:1707.06347, eq. 7, with the sign turned).

    Args:
        logprobs: [...] nats, from the policy now.
        old_logprobs: [...] nats, from the policy that sampled.
        advantages: [...].
        clip_range: The ratio earns nothing outside [1 - clip_range, 1 + clip_range_high].
        clip_range_high: See `clip_range`; None: the same number.
    """
    ratio = _difference(logprobs, old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return (-advantages * ratio).maximum(-advantages * clipped)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error per token, taken as the larger of the error of the value and of the clipped value.

    Args:
        values: [...], from the critic now.
        old_values: [...], from the critic before the update.
        returns: [...], the target.
        clip_range: Bound of the clipped value's distance to the old one; infinity: plain squared error.
    """
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    return (values - returns).square().maximum((clipped - returns).square()) / 2


def penalty_figures(penalty: Tensor) -> dict[str, float]:
    """Mean and variance over trajectories of what each pays, [B]; those that pay nothing count too."""
    penalty = penalty.detach().double()
    return {"penalty_mean": float(penalty.mean()), "penalty_variance": float(penalty.var(correction=0))}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the variance of the returns that the values foretell; 1 is perfect, and a constant explains 0.

    Args:
        values: Values of the critic before the update, any shape.
        returns: Same shape.
        mask: Same shape, bool, True for the entries that count.

    Returns:
        1 - Var(returns - values) / Var(returns), at most 1; 0 where the returns do not vary.
    """
    found, wanted = values[mask].double(), returns[mask].double()
    variance = wanted.var(correction=0) if len(wanted) else wanted.sum()
    return float(1 - (wanted - found).var(correction=0) / variance) if variance > 0 else 0.0


def _difference(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Subtract; the difference is 0 instead of NaN where both are minus infinity."""
    both = (logprobs == -math.inf) & (other_logprobs == -math.inf)
    return logprobs.masked_fill(both, 0.0) - other_logprobs.masked_fill(both, 0.0)
