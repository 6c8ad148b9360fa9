"""The policy loss: pure functions of tensors, equal to TRL 1.16's for every `loss_type` listed in `grpo.config`."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from r1v_rl.grpo.config import GRPOConfig


@dataclass(slots=True)
class LossInputs:
    """One micro-batch, padded to the longest completion. B rows, T completion tokens."""

    logprobs: Float[Tensor, "B T"]
    """Of the policy, with gradients."""
    entropies: Float[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    """True on completion tokens that count; false on padding and on truncated completions that are masked."""
    old_logprobs: Float[Tensor, "B T"] | None = None
    """Of the policy that the rollouts were made with; None where it is the present one."""
    reference_logprobs: Float[Tensor, "B T"] | None = None
    sampler_logprobs: Float[Tensor, "B T"] | None = None
    """As the rollout engine reports them; None where they are the policy's own, or correction is off."""


@dataclass(slots=True)
class Normalisation:
    """What a sum over tokens or rows is divided by, so that micro-batches add up to one optimizer step."""

    accumulation_steps: int
    """Micro-batches in this optimizer step."""
    step_tokens: Float[Tensor, ""]
    """Tokens of the optimizer step on this process: those of the whole generation batch, over all processes, divided
    by the processes and by the optimizer steps that share it."""


@dataclass(slots=True)
class LossStats:
    """Detached per-token values for the metrics; `(B, 1)` where they are one value per sequence."""

    low_clipped: Float[Tensor, "B _"]
    high_clipped: Float[Tensor, "B _"]
    kl: Float[Tensor, "B T"] | None
    sampler_ratio: Float[Tensor, "B _"] | None


def policy_loss(
    inputs: LossInputs,
    args: GRPOConfig,
    normalisation: Normalisation,
    entropy_mask: Shaped[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], LossStats]:
    """The scalar to run backward from, and what the metrics need.

    Args:
        inputs: The micro-batch.
        args: `loss_type`, `epsilon`, `beta` and so on, with TRL's meaning.
        normalisation: Scales of this optimizer step.
        entropy_mask: True on the tokens that carry policy gradient (`top_entropy_quantile`, arXiv:2506.01939).
    """
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    mask = inputs.mask.to(inputs.logprobs.dtype)
    advantages = inputs.advantages.unsqueeze(1)
    ratio = importance_ratio(inputs.logprobs, old, mask, level=args.importance_sampling_level)
    token_loss = _token_loss(ratio, advantages, inputs.logprobs, args)
    if entropy_mask is not None:
        token_loss = token_loss * entropy_mask
    correction = None
    if inputs.sampler_logprobs is not None:
        correction = sampler_correction(old, inputs.sampler_logprobs, mask, args)
        token_loss = token_loss * correction
    kl = None
    if inputs.reference_logprobs is not None:
        kl = kl_to_reference(inputs.logprobs, inputs.reference_logprobs)
        if args.use_bias_correction_kl:
            kl = kl * ratio
        token_loss = token_loss + args.beta * kl
    loss = _aggregate(token_loss, mask, args, normalisation)
    if args.entropy_coef:
        counted = mask if entropy_mask is None else mask * entropy_mask
        bonus = (inputs.entropies * counted).sum() / counted.sum().clamp(min=1.0)
        loss = loss - args.entropy_coef * bonus / normalisation.accumulation_steps
    low, high = _clipped(ratio.detach(), advantages, args)
    return loss, LossStats(low, high, None if kl is None else kl.detach(), correction)


def importance_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Float[Tensor, "B T"], *, level: str
) -> Float[Tensor, "B _"]:
    """Policy over old policy, per token (PPO), or one geometric mean per sequence (GSPO, arXiv:2507.18071)."""
    log_ratio = logprobs - old_logprobs
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1.0)).unsqueeze(1)
    return log_ratio.exp()


def kl_to_reference(logprobs: Float[Tensor, "B T"], reference_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The k3 estimate of KL(policy, reference) at each token: unbiased and never negative."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def sampler_correction(
    old_logprobs: Float[Tensor, "B T"],
    sampler_logprobs: Float[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    args: GRPOConfig,
) -> Float[Tensor, "B _"]:
    """Old policy over sampler, truncated or masked (TIS / MIS): it makes up for an engine that computes otherwise.

    A token whose sampler log-probability is NaN counts as equal.
    """
    difference = ((old_logprobs - sampler_logprobs) * mask).nan_to_num(nan=0.0)
    level, action = args.vllm_importance_sampling_mode.split("_")
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)


def _token_loss(ratio: Tensor, advantages: Tensor, logprobs: Tensor, args: GRPOConfig) -> Tensor:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":  # arXiv:2506.13585
        return -ratio.clamp(max=high).detach() * advantages * logprobs
    if args.loss_type == "sapo":  # arXiv:2511.20347
        temperature = torch.where(advantages > 0, args.sapo_temperature_pos, args.sapo_temperature_neg)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    clipped = ratio.clamp(1 - args.epsilon, 1 + high)
    if args.delta is not None:  # two-sided clipping, arXiv:2505.07291
        ratio = ratio.clamp(max=args.delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def _aggregate(token_loss: Tensor, mask: Tensor, args: GRPOConfig, normalisation: Normalisation) -> Tensor:
    total = (token_loss * mask).sum(1)
    steps = normalisation.accumulation_steps
    if args.loss_type in ("dapo", "cispo"):  # every token of the optimizer step weighs the same
        return total.sum() / normalisation.step_tokens
    if args.loss_type in ("grpo", "sapo"):  # every completion weighs the same
        return (total / mask.sum(1).clamp(min=1.0)).mean() / steps
    if args.loss_type == "bnpo":  # every token of the micro-batch weighs the same
        return total.sum() / mask.sum().clamp(min=1.0) / steps
    if args.loss_type == "dr_grpo":  # a constant: no length bias (arXiv:2503.20783)
        return total.sum() / (len(total) * args.max_completion_length) / steps
    return total.mean() / steps  # luspo: a long completion weighs more (arXiv:2602.05261)


def _clipped(ratio: Tensor, advantages: Tensor, args: GRPOConfig) -> tuple[Tensor, Tensor]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":
        return torch.zeros_like(ratio), ((ratio > high) & (advantages > 0)).float()
    if args.delta is not None:
        ratio = ratio.clamp(max=args.delta)
    low_clipped = (ratio < 1 - args.epsilon) & (advantages < 0)
    high_clipped = (ratio > 1 + high) & (advantages > 0)
    return low_clipped.float(), high_clipped.float()
