"""From rewards to advantages: one number per completion, centred on its own group."""

import torch
from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-4  # TRL's, so that a run moves here unchanged


def weighted_rewards(rewards: Float[Tensor, "P G F"], weights: Float[Tensor, " F"]) -> Float[Tensor, "P G"]:
    """The weighted sum over reward functions; NaN where no function could judge the completion.

    A function that could not judge (NaN) counts nothing in the sum; a completion that none could judge stays NaN, so
    that it takes no part in its group's mean.
    """
    total = (rewards * weights).nansum(-1)
    return total.masked_fill(rewards.isnan().all(-1), torch.nan)


def group_advantages(
    rewards: Float[Tensor, "P G"], *, scale: str, batch_std: Float[Tensor, ""] | None = None
) -> Float[Tensor, "P G"]:
    """Centre each prompt's rewards on their mean (GRPO, arXiv:2402.03300), and scale them.

    Args:
        rewards: One scalar per completion; NaN marks one that no reward could judge. It gets advantage 0.
        scale: `group` divides by the group's standard deviation (GRPO), `batch` by `batch_std`, `none` by nothing
            (Dr. GRPO, arXiv:2503.20783).
        batch_std: Standard deviation of the whole generation batch, over all processes.

    Raises:
        ValueError: If G < 2, where every advantage would be zero.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions, got {rewards.shape[1]}")
    advantages = rewards - rewards.nanmean(1, keepdim=True)
    equal = rewards.nan_to_num(nan=torch.inf).amin(1) == rewards.nan_to_num(nan=-torch.inf).amax(1)
    advantages = advantages.masked_fill(equal[:, None], 0.0)  # not the mean's rounding error
    if scale == "group":
        advantages = advantages / (nan_std(rewards, dim=1).unsqueeze(1) + _EPSILON)
    elif scale == "batch":
        assert batch_std is not None, "scale='batch' needs the batch's standard deviation"
        advantages = advantages / (batch_std + _EPSILON)
    return advantages.nan_to_num(nan=0.0)


def normalised_sum_advantages(
    rewards: Float[Tensor, "P G F"], weights: Float[Tensor, " F"], reduce_mean_std=None
) -> Float[Tensor, "P G"]:
    """Normalise each reward function within its group, then sum, then normalise over the batch (GDPO).

    TRL's `multi_objective_aggregation: normalize_then_sum`.

    Args:
        rewards: One scalar per completion and reward function; NaN = could not judge.
        weights: One per reward function.
        reduce_mean_std: Takes the local sums (P, G) and returns their mean and standard deviation over all processes;
            local ones where it is None.
    """
    centred = rewards - rewards.nanmean(1, keepdim=True)
    per_function = centred / (nan_std(rewards, dim=1).unsqueeze(1) + _EPSILON)
    total = weighted_rewards(per_function, weights)
    mean, std = reduce_mean_std(total) if reduce_mean_std else (total.nanmean(), nan_std(total.flatten(), dim=0))
    return ((total - mean) / (std + _EPSILON)).nan_to_num(nan=0.0)


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Sample standard deviation (n - 1) along `dim`, NaN left out; NaN where fewer than two values are left."""
    count = (~values.isnan()).sum(dim)
    variance = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim) / (count - 1)
    return torch.where(count > 1, variance.sqrt(), torch.nan)
