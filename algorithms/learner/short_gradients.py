"""Functions whose gradient by hand takes fewer passes over memory than the one that autograd puts together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from algorithms.learner import ops


def normed(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square; RMS norm without its weight.

    Args:
        x: [..., d].
        eps: Added to the mean square.
    """
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return _Normed.apply(x, eps) if needs_gradient else x * _one_over_size(x, eps)


def logprobs_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the given token and entropy of each row; both carry gradient.

    The results are those of `ops.gather_logprobs` and `ops.token_entropy`, also where logits are minus infinity.

    Args:
        logits: [n, V].
        ids: [n] int64.

    Returns:
        Two tensors [n], nats.
    """
    logprobs, entropy = _LogprobsAndEntropy.apply(logits, ids)
    if entropy.isfinite().all():  # else some logit is minus infinity
        return logprobs, entropy
    return ops.gather_logprobs(logits, ids), ops.token_entropy(logits)


def _one_over_size(x: Tensor, eps: float) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _Normed(Function):
    """y = x / size; dx = (dy - y mean(dy y)) / size, where the small eps is part of the size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        factor = _one_over_size(x, eps)
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (y, factor) = gradients, ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, y).unsqueeze(-1).div_(y.shape[-1])
        return torch.addcmul(gradient, y, along, value=-1).mul_(factor), None


class _LogprobsAndEntropy(Function):
    """With p = softmax(z): d log p_i / dz = 1[i] - p, and dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(dim=-1)
        p = log_p.exp()
        logprobs = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        entropy = -torch.linalg.vecdot(p, log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(p, log_p, entropy, ids)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (of_logprobs, of_entropy), (p, log_p, entropy, ids) = gradients, ctx.saved_tensors
        of_logprobs = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs
        if of_entropy is None:
            result = p * -of_logprobs.unsqueeze(-1)
        else:
            result = log_p + entropy.unsqueeze(-1)
            result.mul_(-of_entropy.unsqueeze(-1)).sub_(of_logprobs.unsqueeze(-1)).mul_(p)
        return result.scatter_add_(-1, ids.unsqueeze(-1), of_logprobs.unsqueeze(-1)), None
