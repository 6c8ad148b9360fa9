"""What one micro-batch of a recipe runs: tokens, positions, pairs; from the recipe's keys and its rows' lengths."""

import math

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.plan.needs import Work
from r1v_rl.sft.config import SFTConfig


def grpo_work(args: GRPOConfig, *, prompt: float, visual: float, completion: float) -> Work:
    """A micro-batch of `per_device_train_batch_size` completions, in passes within `max_tokens_per_forward`.

    Args:
        prompt: Tokens of a prompt, visual ones included.
        visual: Of them, visual ones.
        completion: Tokens of a completion.
    """
    assert args.num_generations is not None
    rows = args.per_device_train_batch_size
    groups = max(1, rows // args.num_generations)
    prompts = groups if args.share_prefix else rows
    tokens = rows * completion + prompts * prompt
    seen = rows * completion * (prompt + completion / 2) + prompts * prompt**2 / 2
    passes = math.ceil(tokens / args.max_tokens_per_forward) if args.max_tokens_per_forward else 1
    fullest = min(tokens, args.max_tokens_per_forward or tokens) * passes / tokens
    return Work(tokens / passes, rows * completion / passes, seen / passes, groups * visual, passes, fullest)


def sft_work(args: SFTConfig, *, sample: float, visual: float, target: float) -> Work:
    """A micro-batch of packed rows, or of samples.

    Args:
        sample: Tokens of a sample, visual ones included.
        visual: Of them, visual ones.
        target: Of them, tokens that the loss is on.
    """
    rows = args.per_device_train_batch_size
    samples = rows * max(1.0, args.max_length / sample) if args.packing and args.max_length else float(rows)
    return Work(samples * sample, samples * target, samples * sample**2 / 2, samples * visual)
