"""Which completions an update must run, in how many passes, and how the rest fill their places."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float, Int
from torch import Tensor

from r1v_rl.grpo.batch import GenerationBatch
from r1v_rl.grpo.config import GRPOConfig


def rows_to_run(batch: GenerationBatch, rows: Sequence[int], args: GRPOConfig, *, at_least_one: bool) -> list[int]:
    """Those of `rows` that can move the weights: they count and their advantage is not 0; all, where the KL term, the
    entropy or a quantile over tokens needs all.

    Args:
        batch: The generation batch.
        rows: Rows of one micro-batch.
        args: The recipe.
        at_least_one: Run the shortest row where none moves anything: the processes of a distributed run must make
            the same calls.
    """
    if args.needs_every_completion or not args.skip_zero_advantage:
        return list(rows)
    advantages = batch.advantages.tolist()
    moving = [row for row in rows if batch.counts[row] and advantages[row] != 0.0 and batch.completion_ids[row]]
    return [shortest(batch, rows)] if not moving and at_least_one else moving


def shortest(batch: GenerationBatch, rows: Sequence[int]) -> int:
    """The row of these that costs least."""
    return min(
        rows,
        key=lambda row: len(batch.prompts[row // batch.num_generations].prompt_ids) + len(batch.completion_ids[row]),
    )


def idle_passes(count: int, accelerator: Accelerator) -> int:
    """How many passes this process must run beside its `count`, so that all run as many: FSDP2 and ZeRO-3 gather
    weights, and ZeRO-2 reduces gradients, in every one."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return 0
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts.max()) - count


@contextmanager
def not_the_last_pass(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Around forward and backward of a pass that others of the same micro-batch follow: DDP's processes meet in the
    last, DeepSpeed would take its step after this one, and FSDP2 would keep whole gradients if it were told to wait."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = accelerator.gradient_state
        last = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(last)
    elif accelerator.distributed_type == DistributedType.FSDP:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def within_budget(
    batch: GenerationBatch, rows: Sequence[int], budget: int | None, *, share_prefix: bool
) -> list[list[int]]:
    """`rows` in as few passes, in order, as keep each within `budget` tokens; a longer row is a pass of its own.

    Tokens are those that the pass computes: with `share_prefix` each prompt once, else padded rows.
    """
    passes: list[list[int]] = []
    for row in rows:
        longer = [*passes[-1], row] if passes else [row]
        if passes and (budget is None or _tokens(batch, longer, share_prefix) <= budget):
            passes[-1] = longer
        else:
            passes.append([row])
    return passes


def _tokens(batch: GenerationBatch, rows: list[int], share_prefix: bool) -> int:
    owners = [row // batch.num_generations for row in rows]
    prompts = {owner: len(batch.prompts[owner].prompt_ids) for owner in owners}
    lengths = [len(batch.completion_ids[row]) for row in rows]
    if share_prefix:
        return sum(prompts.values()) + sum(lengths)
    return len(rows) * max(prompts[owner] + length for owner, length in zip(owners, lengths, strict=True))


def spread(values: Float[Tensor, "R t"], places: Int[Tensor, " R"], rest: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`rest` with rows `places` replaced by `values`, which are zero on their padding."""
    filled = rest.clone()
    filled[places] = torch.nn.functional.pad(values, (0, rest.shape[1] - values.shape[1]))
    return filled


def zero_with_gradient(model: Any) -> Float[Tensor, ""]:
    """Zero, with a gradient of zero for every trainable parameter: what an update of no rows comes to."""
    firsts = [p.flatten()[0] for p in model.parameters() if p.requires_grad]
    return torch.stack([first.float() for first in firsts]).sum() * 0.0
