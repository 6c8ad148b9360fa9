"""Rollouts as they are kept and shown: parquet, the wandb table, the console."""

from collections.abc import Sequence

from torch import Tensor
from transformers import TrainerCallback

from r1v_rl.grpo.rewards import Rewarded
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.tracking.completions import CompletionRecord, completion_lines
from r1v_rl.types import RolloutGroup

ANSWER_COLUMNS = ("answer_parsed", "parsed_answer")
"""Extra columns of the accuracy reward that hold what it read from the completion."""


def completion_records(
    prompts: Sequence[EncodedPrompt], groups: Sequence[RolloutGroup], rewarded: Rewarded
) -> list[CompletionRecord]:
    """One record for each completion, in group order."""
    records = []
    for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for g, completion in enumerate(group.completions):
            row = p * len(group.completions) + g
            extra = {name: values[row] for name, values in rewarded.extra.items() if row < len(values)}
            records.append(
                CompletionRecord(
                    example_id=group.example.id,
                    prompt=prompt.text,
                    completion=completion.text,
                    token_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    rewards={name: _number(rewarded.per_function[p, g, i]) for i, name in enumerate(rewarded.names)},
                    reward=_number(rewarded.rewards[p, g]),
                    advantage=_number(rewarded.advantages[p, g]),
                    weight_version=group.weight_version,
                    is_truncated=completion.is_truncated,
                    answer=next((extra[name] for name in ANSWER_COLUMNS if name in extra), None),
                    gold=group.example.answer,
                    images=prompt.images,
                    extra=extra,
                )
            )
    return records


def show_completions(
    callbacks: Sequence[TrainerCallback], step: int, records: list[CompletionRecord], limit: int
) -> None:
    """Print a few completions, and hand the table to the callbacks that take one (wandb)."""
    print(completion_lines(records, limit), flush=True)
    for callback in callbacks:
        if hasattr(callback, "log_completions"):
            callback.log_completions(step, records)


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
