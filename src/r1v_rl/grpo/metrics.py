"""What a GRPO run reports: TRL's names and meanings, and ours under `rollout/`, `reward_workers/` and `sampling/`."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from r1v_rl.grpo.advantages import nan_std
from r1v_rl.grpo.loss import LossInputs, LossStats
from r1v_rl.grpo.rewards import Rewarded
from r1v_rl.types import RolloutGroup


class Metrics:
    """Values since the last log line; `flush` averages them over time and processes."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._values: dict[str, list[float]] = defaultdict(list)
        self.num_tokens = 0
        """Prompt and completion tokens since the start of training, over all processes; kept in checkpoints."""

    def add(self, name: str, value: float | int | Tensor) -> None:
        self._values[name].append(float(value))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds of the block under `rollout/seconds_{name}`."""
        started = time.perf_counter()
        yield
        self.add(f"rollout/seconds_{name}", time.perf_counter() - started)

    def add_all(self, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self.add(name, value)

    def add_staleness(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Optimizer steps between the weights that sampled these groups and those that begin to train on them."""
        found = [step - group.weight_version for group in groups]
        self.add("staleness/mean", sum(found) / len(found))
        self.add("staleness/max", max(found))

    def flush(self, prefix: str = "") -> dict[str, float | None]:
        """Averages since the last flush (extremes where the name says so), NaN left out; None where none is left."""
        local = {name: [v for v in values if not math.isnan(v)] for name, values in self._values.items()}
        self._values.clear()
        merged: dict[str, list[float]] = defaultdict(list)
        for share in gather_object([local]):
            for name, values in share.items():
                merged[name] += values
        return {prefix + name: _reduce(name, values) for name, values in sorted(merged.items())}

    def add_rollout(self, groups: Sequence[RolloutGroup], rewarded: Rewarded) -> None:
        """Rewards, lengths and truncation of one generation on this process."""
        for i, name in enumerate(rewarded.names):
            values = rewarded.per_function[..., i].flatten()
            self.add(f"rewards/{name}/mean", values.nanmean())
            self.add(f"rewards/{name}/std", nan_std(values, dim=0))
        self.add("reward", rewarded.rewards.nanmean())
        self.add("reward_std", nan_std(rewarded.rewards.flatten(), dim=0))
        stds = nan_std(rewarded.rewards, dim=1)
        self.add("frac_reward_zero_std", torch.isclose(stds, torch.zeros_like(stds)).float().mean())
        for name, value in rewarded.scalars.items():
            self.add(name, value)
        completions = [c for group in groups for c in group.completions]
        lengths = torch.tensor([float(len(c.token_ids)) for c in completions])
        ended = torch.tensor([not c.is_truncated for c in completions])
        self._add_lengths("completions/{}_length", lengths)
        self._add_lengths("completions/{}_terminated_length", lengths[ended] if ended.any() else torch.zeros(1))
        self.add("completions/clipped_ratio", 1.0 - ended.float().mean())
        prompts = sum(len(group.prompt_ids) * len(group.completions) for group in groups)
        self.num_tokens += int(sum(gather_object([prompts + int(lengths.sum())])))
        self.add("num_tokens", self.num_tokens)

    def _add_lengths(self, pattern: str, lengths: Tensor) -> None:
        for what, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
            self.add(pattern.format(what), value)

    def add_update(self, inputs: LossInputs, stats: LossStats, sampler_logprobs: Tensor | None) -> None:
        """Entropy, KL, clipping, and how far the sampler was from the policy, of one micro-batch."""
        mask = inputs.mask
        self.add("entropy", masked_mean(inputs.entropies.detach(), mask))
        if stats.kl is not None:
            self.add("kl", masked_mean(stats.kl, mask))
        low, high = stats.low_clipped, stats.high_clipped
        self.add("clip_ratio/low_mean", masked_mean(low, mask))
        self.add("clip_ratio/high_mean", masked_mean(high, mask))
        self.add("clip_ratio/region_mean", masked_mean((low + high).clamp(max=1.0), mask))
        self.add("clip_ratio/low_min", _row_means(low, mask).min())
        self.add("clip_ratio/high_max", _row_means(high, mask).max())
        if sampler_logprobs is not None and mask.any():
            old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
            difference = (old - sampler_logprobs)[mask].abs()
            difference = difference[~difference.isnan()]
            if len(difference):
                self.add("sampling/sampling_logp_difference/mean", difference.mean())
                self.add("sampling/sampling_logp_difference/max", difference.max())
        if stats.sampler_ratio is not None:
            self._add_sampler_ratio(stats.sampler_ratio, mask)

    def _add_sampler_ratio(self, ratio: Tensor, mask: Tensor) -> None:
        """The correction's range, and the share of tokens it drops, by length of the completion."""
        used = ratio[:, 0] if ratio.shape[1] == 1 else ratio[mask]
        if len(used):
            self.add("sampling/importance_sampling_ratio/distance", (used - 1.0).abs().mean())
            for what, value in (("min", used.min()), ("mean", used.mean()), ("max", used.max())):
                self.add(f"sampling/importance_sampling_ratio/{what}", value)
        dropped = ((ratio == 0) & mask).sum(1)
        lengths = mask.sum(1)
        for row_dropped, length in zip(dropped.tolist(), lengths.tolist(), strict=True):
            if length:
                self.add(f"sampling/masked_frac/{_length_bucket(length)}", row_dropped / length)


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the counted tokens; over the rows where there is one value a row; NaN where nothing counts."""
    if values.shape[1] == 1 and mask.shape[1] != 1:
        return values.float().mean().item()
    return (values * mask).sum().item() / total if (total := mask.sum().item()) else math.nan


def entropy_mask(entropies: Tensor, mask: Tensor, quantile: float, accelerator: Accelerator) -> Tensor | None:
    """True on the `quantile` share of tokens with the highest entropy, over all processes; None where all are kept.

    "Beyond the 80/20 rule" (arXiv:2506.01939): the policy gradient of the other tokens is dropped.
    """
    if quantile >= 1.0:
        return None
    everywhere = accelerator.gather(accelerator.pad_across_processes(entropies[mask].float(), pad_index=-1.0))
    everywhere = everywhere[everywhere >= 0]
    if not len(everywhere):
        return torch.zeros_like(mask)
    return (entropies >= torch.quantile(everywhere, 1 - quantile)) & mask


def _reduce(name: str, values: list[float]) -> float | None:
    if not values:
        return None
    last = name.rsplit("/", 1)[-1]
    if last == "max" or last.startswith("max_") or last.endswith("_max"):
        return max(values)
    if last == "min" or last.startswith("min_") or last.endswith("_min"):
        return min(values)
    return sum(values) / len(values)


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    if values.shape[1] == 1:
        return values[:, 0].float()
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _length_bucket(length: int) -> str:
    """`1-63`, `64-255`, ...: powers of four."""
    low, high = 1, 64
    while length >= high:
        low, high = high, high * 4
    return f"{low}-{high - 1}"
