"""A generation batch: whole groups, from the rollout to the loss, cut into micro-batches of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from r1v_rl.models.families import joined, num_units
from r1v_rl.models.logprobs import Scored
from r1v_rl.models.packing import PackedLayout
from r1v_rl.rollout.prompts import EncodedPrompt


@dataclass(slots=True)
class GenerationBatch:
    """P prompts and their B = P * G completions, in group order: row r belongs to prompt r // G."""

    prompts: list[EncodedPrompt]
    completion_ids: list[list[int]]
    """B rows."""
    counts: list[bool]
    """B rows; False leaves a row out of the loss (a truncated completion, where the recipe says so)."""
    advantages: Tensor
    """(B,)"""
    process_tokens: float
    """Counted tokens of the whole batch over all processes, divided by the processes."""
    weight_version: int
    """Optimizer steps behind the (oldest) weights that sampled it."""
    rows: list[int] = field(default_factory=list)
    """P places of the prompts in the training data; empty where they are not of it."""
    sampler_logprobs: list[Tensor] | None = None
    """B ragged rows; None where the engine is the policy itself."""
    old_logprobs: list[Tensor] | None = None
    reference_logprobs: list[Tensor] | None = None

    @property
    def num_generations(self) -> int:
        return len(self.completion_ids) // len(self.prompts)


@dataclass(slots=True)
class ModelInputs:
    """B rows of a generation batch as the policy takes them, and where their T tokens lie."""

    kwargs: dict[str, Any]
    """`input_ids` and what goes with them, and the vision inputs, each prompt's once."""
    scored: Scored
    token_mask: Tensor
    """(B, T) bool: completion tokens, whether they count or not."""


def model_inputs(
    batch: GenerationBatch, rows: Sequence[int], *, pad_token_id: int, device: Any, share_prefix: bool
) -> ModelInputs:
    """These rows for the policy; every prompt's pixels appear once, whatever G is.

    With `share_prefix` every prompt too: one row without padding holds each prompt, followed by its completions.
    """
    group = batch.num_generations
    owners = [row // group for row in rows]
    completions = [batch.completion_ids[row] for row in rows]
    prompts = {p: batch.prompts[p] for p in dict.fromkeys(owners)}
    if share_prefix:
        kwargs, positions = _packed_row(prompts, owners, completions, device)
    else:
        kwargs, positions = _padded_rows(prompts, owners, completions, pad_token_id, device)
    vision, image_rows = _vision(prompts, owners)
    return ModelInputs(
        kwargs={**kwargs, **vision},
        scored=Scored(
            torch.tensor(positions, device=device),
            torch.tensor([token for ids in completions for token in ids], device=device),
            None if image_rows is None or share_prefix else torch.tensor(image_rows, device=device),
        ),
        token_mask=token_mask(batch, rows).to(device),
    )


def token_mask(batch: GenerationBatch, rows: Sequence[int]) -> Bool[Tensor, "B T"]:
    """True on the completion tokens of these rows, T the longest."""
    lengths = torch.tensor([len(batch.completion_ids[row]) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def loss_mask(batch: GenerationBatch, rows: Sequence[int]) -> Bool[Tensor, "B T"]:
    """True on those that count."""
    return token_mask(batch, rows) & torch.tensor([batch.counts[row] for row in rows])[:, None]


def _padded_rows(
    prompts: dict[int, EncodedPrompt], owners: list[int], completions: list[list[int]], pad_token_id: int, device: Any
) -> tuple[dict[str, Any], list[int]]:
    """Right-padded rows of prompt and completion, and the positions that predict the completions' tokens."""
    rows = [prompts[p].prompt_ids + ids for p, ids in zip(owners, completions, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    positions: list[int] = []
    for i, (row, ids) in enumerate(zip(rows, completions, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        first = i * width + len(row) - len(ids) - 1
        positions.extend(range(first, first + len(ids)))
    kwargs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if any(prompt.positions is not None for prompt in prompts.values()):
        kwargs["position_ids"] = _padded_positions([prompts[p] for p in owners], rows, width).to(device)
    return kwargs, positions


def _padded_positions(prompts: list[EncodedPrompt], rows: list[list[int]], width: int) -> Int[Tensor, "3 B T"]:
    """Each row's own, for a model that counts them by time, height and width; 0 on padding."""
    padded_rows = torch.zeros((3, len(rows), width), dtype=torch.long)
    for r, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        end = len(prompt.prompt_ids)
        own = torch.arange(end) if prompt.positions is None else prompt.positions
        padded_rows[:, r, :end] = own
        padded_rows[:, r, end : len(row)] = torch.arange(len(row) - end) + own.max() + 1
    return padded_rows


def _packed_row(
    prompts: dict[int, EncodedPrompt], owners: list[int], completions: list[list[int]], device: Any
) -> tuple[dict[str, Any], list[int]]:
    """Each prompt once, then its completions (without their last tokens, which predict nothing), in one row; and the
    positions that predict the completions' tokens: the first of each completion is predicted by the prompt's end."""
    row: list[int] = []
    lengths: list[int] = []
    prefixes: list[int | None] = []
    positions: list[int] = []
    own_positions: dict[int, Tensor] = {}
    for p, prompt in prompts.items():
        segment, prompt_end = len(lengths), len(row) + len(prompt.prompt_ids)
        row += prompt.prompt_ids
        lengths.append(len(prompt.prompt_ids))
        if prompt.positions is not None:
            own_positions[segment] = prompt.positions
        prefixes.append(None)
        for ids in (ids for owner, ids in zip(owners, completions, strict=True) if owner == p and ids):
            positions += [prompt_end - 1, *range(len(row), len(row) + len(ids) - 1)]
            if len(ids) > 1:
                row += ids[:-1]
                lengths.append(len(ids) - 1)
                prefixes.append(segment)
    layout = PackedLayout.of(lengths, prefixes)
    kwargs = {"input_ids": torch.tensor([row], device=device), **layout.forward_kwargs(device, own_positions)}
    return kwargs, positions


def _vision(prompts: dict[int, EncodedPrompt], owners: list[int]) -> tuple[dict[str, Tensor], list[int] | None]:
    """The vision inputs of the prompts, each once, and the tile (or picture) that fills each slot of the rows."""
    inputs = joined([prompt.vision_inputs for prompt in prompts.values()])
    if not inputs:
        return {}, None
    tiles: dict[int, range] = {}
    offset = 0
    for p, prompt in prompts.items():
        count = num_units(prompt.vision_inputs)
        tiles[p] = range(offset, offset + count)
        offset += count
    return inputs, [tile for p in owners for tile in tiles[p]]


def score(model: nn.Module, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completion tokens, (B, T), zero on padding."""
    scores = model(scored=inputs.scored, **inputs.kwargs)
    empty = scores.logprobs.new_zeros(inputs.token_mask.shape)
    return (
        empty.masked_scatter(inputs.token_mask, scores.logprobs),
        empty.masked_scatter(inputs.token_mask, scores.entropies),
    )


def padded(values: list[Tensor] | None, rows: Sequence[int], like: Tensor) -> Float[Tensor, "B T"] | None:
    """These ragged rows as a float32 tensor of the shape and on the device of `like`, zero on padding."""
    if values is None:
        return None
    out = torch.zeros(like.shape, device=like.device)
    for i, row in enumerate(rows):
        out[i, : len(values[row])] = values[row]
    return out
