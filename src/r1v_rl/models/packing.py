"""Packed rows: several segments in one row without padding, each seeing itself and, where it has one, its prefix.

A prompt and its completions share one row: `PackedLayout.of([prompt, *completions], prefixes=[None, 0, 0, ...])`
computes the prompt once, and its gradients are the sum over the completions. Without prefixes it is plain sequence
packing: `PackedLayout.of(lengths)`. How to use it:

    enable_packing(model)  # once; the plain forward and `generate` stay what they are
    layout = PackedLayout.of([120, 40, 35], prefixes=[None, 0, 0])
    model(input_ids=row, pixel_values=pixels, **layout.forward_kwargs(device))

`input_ids` is (1, T), the segments one after the other; image tokens may lie in any of them, in the order of
`pixel_values`. The outputs are (1, T, ...). Works under gradient checkpointing, LoRA, DDP and FSDP.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r1v_rl.errors import UserError
from r1v_rl.models.attention_parts import kernel_for

ATTENTION = "r1v_packed"
"""Name under which attention and mask function are registered with transformers."""
SUPPORTED_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")
"""`model_type` of the language models whose attention is plain causal softmax attention, tested."""
_OTHER_LAYERS = {
    "sliding_attention": "see a sliding window only",
    "chunked_attention": "see their own chunk only",
    "linear_attention": "are linear attention, which keeps a state in the order of the row",
}

Block = tuple[slice, slice, bool]
"""(queries, keys, causal)"""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start:end` of the row."""

    start: int
    end: int
    prefix: int | None
    """Index of the segment that this one sees wholly, before itself; None = it sees itself only."""

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the segments of one row lie, and what each of them sees. T = tokens of the row."""

    segments: tuple[Segment, ...]
    first_read: tuple[int, ...] | None = None
    """For each segment the first of its tokens that is asked for, its end where none is; None = all of every one."""

    @classmethod
    def of(cls, lengths: list[int], prefixes: list[int | None] | None = None) -> "PackedLayout":
        """Segments of these lengths, one after the other.

        Args:
            lengths: Tokens of each segment, at least 1.
            prefixes: For each segment the index of an earlier segment that it continues, or None. A prefix has no
                prefix of its own.

        Raises:
            ValueError: If a length or a prefix is none of these.
        """
        prefixes = [None] * len(lengths) if prefixes is None else prefixes
        segments: list[Segment] = []
        start = 0
        for i, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
            if length < 1:
                raise ValueError(f"segment {i} has {length} tokens; every segment needs at least one")
            if prefix is not None and (not 0 <= prefix < i or segments[prefix].prefix is not None):
                raise ValueError(f"segment {i} continues {prefix}, which is no earlier segment without a prefix")
            segments.append(Segment(start, start + length, prefix))
            start += length
        return cls(tuple(segments))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.segments[-1].end

    def position_ids(
        self, device: torch.device | str | None = None, own: Mapping[int, Tensor] | None = None
    ) -> Int[Tensor, "1 T"] | Int[Tensor, "axes 1 T"]:
        """Positions from 0 in every segment without a prefix, and from the prefix's end in the others.

        Args:
            own: Segment without a prefix -> its positions (axes, tokens), where the model counts them otherwise
                (`families.token_positions`). A segment that continues it goes on after the highest of them.
        """
        own = own or {}
        parts: list[Tensor] = []
        for index, segment in enumerate(self.segments):
            first = 0 if segment.prefix is None else int(parts[segment.prefix].max()) + 1
            counted = torch.arange(first, first + segment.length)[None]
            parts.append(own.get(index, counted))
        if not own:
            return torch.cat(parts, dim=1).to(device)
        axes = max(len(part) for part in parts)
        return torch.cat([part.expand(axes, -1) for part in parts], dim=1)[:, None].to(device)

    def forward_kwargs(
        self, device: torch.device | str | None = None, own_positions: Mapping[int, Tensor] | None = None
    ) -> dict[str, Any]:
        """What the model's forward takes beside `input_ids` and pixels; `own_positions` as in `position_ids`.

        The mask is a 4D placeholder, which transformers hands through as it is: else it would build a T x T one.
        """
        return {
            "position_ids": self.position_ids(device, own_positions),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "packed_layout": self,
        }

    def reading(self, rows: Int[Tensor, " N"]) -> "PackedLayout":
        """The same for attention whose output is read at `rows` alone, which are in order."""
        starts = torch.tensor([s.start for s in self.segments])
        rows = rows.cpu()
        firsts = torch.cat([rows, torch.tensor([self.num_tokens])])[torch.searchsorted(rows, starts)].tolist()
        return replace(self, first_read=tuple(min(f, s.end) for f, s in zip(firsts, self.segments, strict=True)))

    def blocks(self) -> list[Block]:
        """Each segment to itself, to what it has before its first token that is read, and each run of neighbours to the
        prefix they share."""
        firsts = self.first_read or [s.start for s in self.segments]
        own: list[Block] = []
        before: list[Block] = []
        shared: list[Block] = []
        for segment, first in zip(self.segments, firsts, strict=True):
            queries = slice(first, segment.end)
            if first == segment.end:
                continue
            own.append((queries, queries, True))
            if segment.start < first:
                before.append((queries, slice(segment.start, first), False))
            if segment.prefix is not None:
                prefix = self.segments[segment.prefix]
                keys = slice(prefix.start, prefix.end)
                if shared and shared[-1][1] == keys and shared[-1][0].stop == first:
                    queries = slice(shared.pop()[0].start, segment.end)
                shared.append((queries, keys, False))
        return own + before + shared


def enable_packing(model: PreTrainedModel) -> None:
    """Give the language model of `model` the attention that follows a `packed_layout`.

    Without a layout the forward, and `generate`, compute what `sdpa` does. Call it before PEFT wraps the model.

    Raises:
        UserError: If the model cannot run packed rows (`why_not_packed`).
    """
    check_packing(model)
    if model.config.get_text_config() is model.config:
        model.set_attn_implementation(ATTENTION)
    else:
        model.set_attn_implementation({"text_config": ATTENTION})


def check_packing(model: nn.Module) -> None:
    """Refuse a model that cannot run packed rows.

    Raises:
        UserError: Saying why.
    """
    if reason := why_not_packed(model):
        raise UserError(
            f"this model cannot run packed rows: {reason}; set `packing: false` (and `padding_free: false`)"
        )


def why_not_packed(model: nn.Module) -> str | None:
    """Why `model` cannot run packed rows, in words; None where it can. A LoRA-wrapped model is looked through."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    uniform = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    for kind in set(getattr(config, "layer_types", None) or uniform) - {"full_attention"}:
        return f"some of its layers {_OTHER_LAYERS.get(kind, f'are `{kind}`')}"
    if getattr(config, "use_bidirectional_attention", None):
        return "its image tokens see those after them (`use_bidirectional_attention`)"
    if config.model_type not in SUPPORTED_LANGUAGE_MODELS:
        return f"its language model is a `{config.model_type}`; known are {', '.join(SUPPORTED_LANGUAGE_MODELS)}"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention dropout ({config.attention_dropout}) must draw another mask for every completion"
    for name, module in model.named_modules():
        in_encoder = re.search(r"(^|\.)(vision|visual)", name)
        if isinstance(module, nn.Dropout) and module.p > 0 and not in_encoder:
            return f"dropout ({module.p} in `{name}`) must draw another mask for every completion"
    return None


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B Hk S D"],
    value: Float[Tensor, "B Hk S D"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Attention function for transformers. With a layout B is 1 and S is T; without one this is `sdpa`."""
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or query.shape[0] != 1 or query.shape[2] != packed_layout.num_tokens:
        raise ValueError(
            f"a packed row needs batch size 1, {packed_layout.num_tokens} tokens and no dropout; "
            f"received {tuple(query.shape)} (batch, heads, tokens, size) and dropout {dropout}"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PackedAttention.apply(query, key, value, packed_layout, scaling).transpose(1, 2), None


class _PackedAttention(torch.autograd.Function):
    """Blocks of `PackedLayout.blocks`, merged by their log-sum-exp; (1, H, T, D) in and out."""

    @staticmethod
    def forward(ctx, query, key, value, layout, scale):
        kernel = kernel_for(query)
        q, k, v = _by_key_head(query, key, value)
        new = query.new_empty if layout.first_read is None else query.new_zeros
        out = new(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        merged, lse = out[0].unflatten(0, q.shape[:2]), q.new_empty(q.shape[:3], dtype=_wide(q))
        for queries, keys, causal in layout.blocks():
            block, block_lse = kernel.forward(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], causal=causal, scale=scale
            )
            if causal:  # the first block of every token that is read: itself
                merged[:, :, queries], lse[:, :, queries] = block, block_lse
            else:
                own = lse[:, :, queries]
                weight = torch.sigmoid(block_lse - own)[..., None]  # exp(block_lse) / (exp(own) + exp(block_lse))
                merged[:, :, queries] = merged[:, :, queries].to(lse.dtype).lerp(block.to(lse.dtype), weight)
                lse[:, :, queries] = torch.logaddexp(own, block_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, out, lse = ctx.saved_tensors
        kernel = kernel_for(query)
        q, k, v = _by_key_head(query, key, value)
        grad, out = (x[0].unflatten(0, q.shape[:2]) for x in (grads[0], out))
        wide = _wide(q)  # for sums over blocks
        new = torch.empty if ctx.layout.first_read is None else torch.zeros
        by_token = (new(x.transpose(1, 2).shape, dtype=wide, device=x.device) for x in (query, key, value))
        of_query, of_key, of_value = (x.transpose(1, 2) for x in by_token)  # as the projections read them
        grad_q, grad_k, grad_v = of_query[0].unflatten(0, q.shape[:2]), of_key[0], of_value[0]
        for queries, keys, causal in ctx.layout.blocks():
            part_q, part_k, part_v = kernel.backward(
                grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
                out[:, :, queries], lse[:, :, queries].contiguous(), causal=causal, scale=ctx.scale,
            )  # fmt: skip
            part_k, part_v = (x[:, 0] if x.shape[1] == 1 else x.sum(1, dtype=wide) for x in (part_k, part_v))
            if causal:  # the first block of every token that is read, as query and as key
                grad_q[:, :, queries], grad_k[:, keys], grad_v[:, keys] = part_q, part_k, part_v
            else:
                grad_q[:, :, queries] += part_q
                grad_k[:, keys] += part_k
                grad_v[:, keys] += part_v
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Hk, H / Hk, T, D) views: key heads become batch rows, and each is expanded to the query heads that read it."""
    heads = key.shape[1], query.shape[1] // key.shape[1]
    expanded = (x[0][:, None].expand(-1, heads[1], -1, -1) for x in (key, value))
    return query[0].unflatten(0, heads), *expanded  # type: ignore[return-value]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
