"""What one micro-batch of a recipe runs: tokens, positions, pairs; from the recipe's keys and its rows' lengths."""

import math

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.plan.needs import Work
from r1v_rl.sft.config import SFTConfig


def grpo_work(args: GRPOConfig, *, prompt: float, visual: float, completion: float) -> Work:
    """A micro-batch of `per_device_train_batch_size` completions, in passes within `max_tokens_per_forward`, each of
    which runs the prompts of its completions.

    Args:
        prompt: Tokens of a prompt, visual ones included.
        visual: Of them, visual ones.
        completion: Tokens of a completion.
    """
    assert args.num_generations is not None
    rows, budget = args.per_device_train_batch_size, args.max_tokens_per_forward or math.inf
    sharing = args.num_generations if args.share_prefix else 1
    sizes: list[float] = []  # of the passes, filled in order as `grpo.update.within_budget` does
    prompts = 0
    for row in range(rows):
        goes_on = row % sharing != 0  # with a prompt that the pass has
        if sizes and sizes[-1] + completion + (0 if goes_on else prompt) <= budget:
            sizes[-1] += completion + (0 if goes_on else prompt)
            prompts += not goes_on
        else:
            sizes.append(prompt + completion)
            prompts += 1
    tokens, passes = sum(sizes), len(sizes)
    seen = rows * completion * (prompt + completion / 2) + prompts * prompt**2 / 2
    fullest = max(*sizes, min(tokens, budget)) * passes / tokens
    visuals = max(1, rows // args.num_generations) * visual
    return Work(tokens / passes, rows * completion / passes, seen / passes, visuals, passes, fullest)


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
