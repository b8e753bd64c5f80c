"""Credit: how much better than expected each token or each trajectory did.

These are pure tensor functions like those of `ops`, where algorithms find them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.settings import FRACTION, check_value, one_of

if TYPE_CHECKING:  # as in `ops`, so that settings can import this without loading torch
    from torch import Tensor

REWARD_SCALES = ("group", "batch", "none")


def gae(
    token_rewards: Tensor, values: Tensor, response_mask: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the model-written tokens only (arXiv:1506.02438, eq. 16).

    Time passes from one model-written token to the next, whatever the environment wrote between them. The value after
    the last one is 0.

    Args:
        token_rewards: [B, T].
        values: [B, T], of the state before each token.
        response_mask: [B, T] bool, True where the model wrote. The other tensors are not read elsewhere.
        discount: Discount per model-written token, in [0, 1].
        gae_lambda: 1 is return minus value, 0 the one-step temporal difference.

    Returns:
        Advantages and returns (advantages + values), both [B, T] and 0 where the model did not write.

    Raises:
        ConfigurationError: The shapes differ, or discount or gae_lambda is outside [0, 1].
    """
    check_value("discount", discount, FRACTION)
    check_value("gae_lambda", gae_lambda, FRACTION)
    if not token_rewards.shape == values.shape == response_mask.shape:
        raise ConfigurationError(
            "token_rewards, values and response_mask must have the same shape [B, T], got "
            f"{tuple(token_rewards.shape)}, {tuple(values.shape)} and {tuple(response_mask.shape)}."
        )
    token_rewards, values, response_mask = token_rewards.detach(), values.detach(), response_mask.bool()
    # Move model-written tokens to the front of each row, in their order. Zeros behind them change nothing.
    order = (~response_mask).byte().argsort(dim=1, stable=True)
    order = order[:, : int(response_mask.sum(dim=1).max()) if len(response_mask) else 0]
    present = response_mask.gather(1, order)
    reward = token_rewards.gather(1, order).masked_fill(~present, 0.0)
    value = values.gather(1, order).masked_fill(~present, 0.0)
    next_value = value.roll(-1, dims=1)
    next_value[:, -1:] = 0
    advantage = reward + discount * next_value - value
    # A_t = sum_k (discount * gae_lambda)^k delta_{t+k}, doubling the number of summed terms in each pass.
    reach = 1
    while reach < advantage.shape[1]:
        summed = advantage.clone()
        summed[:, :-reach] += (discount * gae_lambda) ** reach * advantage[:, reach:]
        advantage = summed
        reach *= 2
    empty = advantage.new_zeros(response_mask.shape)
    return empty.scatter(1, order, advantage), empty.scatter(1, order, advantage + value)


def standardize(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 (Bessel's correction) over the entries that count.

    Args:
        x: Any shape.
        mask: Same shape, bool; x is not read where it is False.

    Returns:
        (x - mean) / sqrt(variance + 1e-8), and 0 where mask is False. A single entry has no variance and becomes 0.
    """
    x, mask = x.detach(), mask.bool()
    num_entries = mask.sum()
    centred = x.masked_fill(~mask, 0.0)
    centred = (centred - centred.sum() / num_entries.clamp(min=1)).masked_fill(~mask, 0.0)
    if num_entries < 2:
        return centred
    return centred * (centred.square().sum() / (num_entries - 1) + 1e-8).rsqrt()


def group_advantages(rewards: Tensor, group_ids: Tensor, scale: str = "group") -> Tensor:
    """How much better each trajectory did than its siblings (GRPO, arXiv:2402.03300, section 4.1.2).

    Args:
        rewards: [B].
        group_ids: [B] int64, equal for trajectories of the same prompt instance.
        scale: What the distance to the group's mean is divided by: "group", the group's standard deviation (Bessel's
            correction) plus 1e-6; "batch", the same of all rewards; "none", nothing.

    Returns:
        [B], exactly 0 in a group whose rewards are equal. Statistics are float64 whatever the dtype.

    Raises:
        ConfigurationError: A group has one member only, or the scale has another name.
    """
    check_value("scale", scale, one_of(REWARD_SCALES))
    # The statistics are computed on the CPU, because some accelerators have no float64.
    reward = rewards.detach().cpu().double()
    groups, index, sizes = group_ids.cpu().unique(return_inverse=True, return_counts=True)
    if (sizes == 1).any():
        lonely = groups[sizes == 1].tolist()
        raise ConfigurationError(
            f"Every group needs at least 2 trajectories, but {len(lonely)} of {len(groups)} have 1 (group_ids "
            f"{lonely[:5]}): without siblings there is no baseline, and the advantage would be the bare reward. "
            "Roll out every question at least twice and give its trajectories one group id."
        )
    zeros = reward.new_zeros(len(groups))
    mean = zeros.index_add(0, index, reward) / sizes
    centred = reward - mean[index]
    # Rounding noise in a constant group must not be blown up to unit size.
    spread = zeros.scatter_reduce(0, index, centred.abs(), "amax")
    centred = centred.masked_fill((mean + spread).isclose(mean, rtol=1e-6, atol=1e-9)[index], 0.0)
    if scale == "group":
        variance = zeros.index_add(0, index, centred.square()) / (sizes - 1)
        centred = centred / (variance.sqrt() + 1e-6)[index]
    elif scale == "batch" and len(reward):
        centred = centred / (reward.std() + 1e-6)
    return (
        centred.to(rewards)
        if rewards.element_size() == 8 and rewards.is_floating_point()
        else centred.float().to(rewards.device)
    )
