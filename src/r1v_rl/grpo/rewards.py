"""Rewards of whole groups: functions called in TRL's signature, and what they say as advantages."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.advantages import group_advantages, nan_std, normalised_sum_advantages, weighted_rewards
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.verdicts import EarlyVerdicts, column_names, said_of
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.types import Example, RolloutGroup


@dataclass(slots=True)
class Rewarded:
    """The rewards of one generation on this process: P prompts, G completions, F functions."""

    names: list[str]
    """F metric names."""
    per_function: Tensor
    """(P, G, F) as the functions returned them; NaN = could not judge."""
    rewards: Tensor
    """(P, G) weighted sums."""
    advantages: Tensor
    """(P, G)"""
    extra: dict[str, list] = field(default_factory=dict)
    """Columns that reward functions logged, P * G values each."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Metrics that reward functions logged, and the counts of the judging workers."""

    def replace(self, place: int, other: "Rewarded", index: int) -> None:
        """Put the rewards of a group of another batch in the place of one of this; metrics stay those of the first."""
        self.per_function[place], self.rewards[place] = other.per_function[index], other.rewards[index]
        size = self.rewards.shape[1]
        for name in (*self.extra, *(set(other.extra) - set(self.extra))):
            values = self.extra.setdefault(name, [])
            values += [None] * (self.rewards.numel() - len(values))
            theirs = other.extra.get(name, [])[index * size : (index + 1) * size]
            values[place * size : (place + 1) * size] = [*theirs, *[None] * (size - len(theirs))]


class RewardStage:
    """Calls the reward functions on groups and turns what they say into advantages.

    Args:
        reward_funcs: Registry names, dotted paths, `file.py:function`, or functions.
        args: Weights, aggregation and scaling of the recipe.
        prompt_opens_think: Whether the chat template opens `<think>`; None = told from each completion.

    Raises:
        RecipeError: If the weights do not match the functions.
    """

    def __init__(self, reward_funcs: list, args: GRPOConfig, *, prompt_opens_think: bool | None = None):
        self._args = args
        names = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.functions = load_rewards(names, args, prompt_opens_think=prompt_opens_think)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(self.functions)
        if len(weights) != len(self.functions):
            raise RecipeError(
                f"`reward_weights` has {len(weights)} values for {len(self.functions)} `reward_funcs`: one for each"
            )
        self._weights = torch.tensor(weights, dtype=torch.float32)

    def __call__(
        self,
        groups: Sequence[RolloutGroup],
        accelerator: Accelerator,
        trainer_state: Any,
        early: EarlyVerdicts | None = None,
    ) -> Rewarded:
        rewarded = self.judge(groups, trainer_state, early)
        rewarded.advantages = self.advantages(rewarded, accelerator)
        return rewarded

    def early(self, examples: Sequence[Example], trainer_state: Any) -> EarlyVerdicts | None:
        """For the verdicts on a generation of these rows, to be begun while it is sampled; None where none can be."""
        functions = [function for function in self.functions if function.per_completion]
        return EarlyVerdicts(functions, examples, trainer_state) if functions else None

    def judge(self, groups: Sequence[RolloutGroup], trainer_state: Any, early: EarlyVerdicts | None = None) -> Rewarded:
        """Rewards without advantages; other processes have no part in it.

        Args:
            early: What has begun already.
        """
        examples = [group.example for group in groups]
        early = early or self.early(examples, trainer_state)
        names = column_names(examples)
        extra: dict[str, list] = defaultdict(list)
        scalars: dict[str, list[float]] = defaultdict(list)
        columns = []
        try:
            if early is not None:
                early.add_rest(groups)
            for function in self.functions:
                if early is None or not function.per_completion:
                    said = said_of(function, groups, names, trainer_state)
                else:
                    said = early.of(function)
                columns.append(torch.tensor([_nan(reward) for reward in said.rewards]))
                for column, values in said.extra.items():
                    extra[column] += values
                for name, numbers in said.scalars.items():
                    scalars[name] += numbers
        finally:
            if early is not None:
                early.close()
        shape = len(groups), len(groups[0].completions)
        per_function = torch.stack(columns, dim=-1).view(*shape, len(columns))
        rewards = weighted_rewards(per_function, self._weights)
        return Rewarded(
            names=[function.name for function in self.functions],
            per_function=per_function,
            rewards=rewards,
            advantages=torch.zeros_like(rewards),
            extra=dict(extra),
            scalars={name: sum(values) / len(values) for name, values in scalars.items()},
        )

    def advantages(self, rewarded: Rewarded, accelerator: Accelerator) -> Tensor:
        """(P, G). All processes must call it."""
        per_function, rewards = rewarded.per_function, rewarded.rewards

        def over_all_processes(values: Tensor) -> tuple[Tensor, Tensor]:
            everywhere = accelerator.gather(values.to(accelerator.device)).cpu()
            return everywhere.nanmean(), nan_std(everywhere.flatten(), dim=0)

        if self._args.multi_objective_aggregation == "normalize_then_sum":
            return normalised_sum_advantages(per_function, self._weights, over_all_processes)
        batch_std = over_all_processes(rewards)[1] if self._args.scale_rewards == "batch" else None
        return group_advantages(rewards, scale=self._args.scale_rewards, batch_std=batch_std)


def _nan(reward: float | None) -> float:
    return float("nan") if reward is None else float(reward)
