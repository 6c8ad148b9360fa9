"""Log-probabilities and entropies at chosen positions only, through the model's own (possibly wrapped) forward."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

from r1v_rl.errors import RecipeError
from r1v_rl.models.last_layer import READ, skip_unread_rows
from r1v_rl.models.norms import fuse_norms
from r1v_rl.models.packing import why_not_packed
from r1v_rl.models.vision import VisionOnce

VOCABULARY_TILE = 32768
CACHED_LOGITS = 1 << 17
"""On a CPU a tile of logits is to stay in the cache, since a dozen elementwise passes go over it."""
LOGITS_AT_ONCE = 1 << 25
"""Logits that are held at a time, where they are computed once."""


@dataclass(slots=True)
class Scored:
    """What to score: the flattened position that predicts each token, and the token."""

    positions: Int[Tensor, " M"]
    """Index into the flattened (B * T) positions; the position before the token."""
    targets: Int[Tensor, " M"]
    image_rows: Int[Tensor, " R"] | None
    """For each tile slot of the batch, in order, the row of `pixel_values` that fills it; None = one to one. Empty for
    a batch without slots, whose `pixel_values` pass through the encoder and are used nowhere (`BlankPicture`)."""


@dataclass
class TokenScores(ModelOutput):
    """Per scored token, float32. A `ModelOutput`, since that is what FSDP2 and DeepSpeed find gradients in."""

    logprobs: Float[Tensor, " M"] = None  # type: ignore[assignment]
    entropies: Float[Tensor, " M"] = None  # type: ignore[assignment]
    is_top1: Bool[Tensor, " M"] | None = None
    """Whether no other token is likelier; None unless the head was told to look."""


def add_logprob_head(
    model: PreTrainedModel, *, temperature: float, float32_head: bool, logprobs_only: bool = False, top1: bool = False
) -> None:
    """Teach `model` the call `model(scored=Scored(...), **inputs) -> TokenScores`.

    The logits of the scored positions alone are computed, once (`_HeadOnce`) or in tiles and, for the backward pass,
    again (TRL's chunked kernel). The call goes through `forward`, so DDP, FSDP and DeepSpeed wrappers see it; without
    `scored` the forward is the original, to rounding. Call it before PEFT wraps the model.

    Args:
        model: A transformers causal or image-text model.
        temperature: Logits are divided by it, as in the sampler.
        float32_head: Run the LM head in float32.
        logprobs_only: For a loss on the log-probabilities alone: entropies need no gradient, which spares the head the
            second computation of its logits where it does not train, or they are few (`may_keep`).
        top1: Fill `is_top1`.
    """
    outputs = ("log_probs", "entropy", *(["is_top1"] if top1 else []))
    original = model.forward
    text_config = model.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    vision = VisionOnce(model)
    if why_not_packed(model) is None:
        skip_unread_rows(model)
        fuse_norms(model)

    @functools.wraps(type(model).forward)
    def forward(self, *args, scored: Scored | None = None, **kwargs):
        if scored is None:
            return original(*args, **kwargs)
        if "packed_layout" in kwargs:
            kwargs[READ] = scored.positions.unique()
        with vision.repeated(scored.image_rows):
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1)[scored.positions]
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden + _no_gradient(self)
        head = _owner_of_weight(self.get_output_embeddings())
        with _as_forward(head, functools.partial(score, head, scored)):
            return head(hidden)  # called, and not its weight read: FSDP2 and ZeRO-3 gather that at a module's call

    def score(head: Any, scored: Scored, hidden: Tensor) -> TokenScores:
        weight, bias = head.weight, head.bias
        with torch.autocast(hidden.device.type, enabled=False) if float32_head else nullcontext():
            if float32_head:
                hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
            trains = weight.requires_grad or (bias is not None and bias.requires_grad)
            once = not trains or may_keep(hidden.shape[0] * weight.shape[0], _compute_dtype(hidden))
            if logprobs_only and not softcap and once:
                return TokenScores(*_HeadOnce.apply(hidden, weight, bias, scored.targets, temperature, top1))
            logprobs, entropies, _, _, is_top1 = ChunkedLogProbFunction.apply(
                hidden, weight, bias, scored.targets, temperature, _vocabulary_tile(hidden), softcap, 1.0, outputs
            )
        return TokenScores(logprobs, entropies, is_top1)

    model.forward = types.MethodType(forward, model)


def check_head(model: PreTrainedModel, peft_config: Any) -> None:
    """Raises RecipeError where an adapter is to stand beside the LM head: only the head's own weight is read here."""
    from peft.tuners.tuners_utils import check_target_module_exists

    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if getattr(peft_config, "target_modules", None) and check_target_module_exists(peft_config, name):
        is_tied = head.weight is model.get_input_embeddings().weight
        raise RecipeError(
            f"`lora_target_modules` must not name the LM head ({name}): its adapter would be part of rollouts, and "
            f"never train. Leave it out (`all-linear` does)"
            + ("" if is_tied else f", or train the whole head: `lora_modules_to_save: [{name}]`")
        )


def may_keep(logits: int | float, dtype: torch.dtype) -> bool:
    """Whether a head that trains keeps its logits for the backward pass: where they are few, and of a dtype in which
    the gradient of its weight is not rounded before it is added."""
    return logits <= LOGITS_AT_ONCE and dtype == torch.float32


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _vocabulary_tile(hidden: Float[Tensor, "M D"]) -> int:
    return VOCABULARY_TILE if hidden.device.type != "cpu" else max(64, CACHED_LOGITS // len(hidden))


def _owner_of_weight(head: Any) -> nn.Module:
    """The head itself, or what an adapter has put in its place."""
    return next(module for module in head.modules() if module._parameters.get("weight") is head.weight)


@contextmanager
def _as_forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Within it `function` is what a call of `module` runs, between the hooks of whoever wraps it."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward  # type: ignore[misc]
        if before is not None:
            module.forward = before


def _no_gradient(model: PreTrainedModel) -> Tensor | float:
    """Zero, with a gradient of zero: a batch without pictures where the projector alone trains."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return 0.0 * torch.stack([p.sum() for p in trainable]).sum() if trainable else 0.0


class _HeadOnce(torch.autograd.Function):
    """Log-probabilities, entropies and, where asked, `is_top1`; no logits are computed again.

    A token's gradient is known but for one factor as soon as its logits are. For the hidden states it is kept, (M,
    hidden); for a head that trains the probabilities are, (M, vocabulary), less one at the target: `may_keep` has seen
    to it that they come at once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, top1):
        hidden, weight = (x.to(_compute_dtype(hidden)) for x in (hidden, weight))
        trains, *head_trains = ctx.needs_input_grad[:3]
        direction = torch.empty_like(hidden) if trains else None
        probabilities = hidden.new_empty(0, len(weight))
        scores = [torch.empty(len(targets), device=hidden.device) for _ in range(2)]
        logprobs, entropies = scores
        is_top1 = torch.empty(len(targets), dtype=torch.bool, device=hidden.device) if top1 else None
        size = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(hidden[part], weight, bias).float()
            if temperature != 1.0:
                logits /= temperature
            wanted = targets[part, None]
            if is_top1 is not None:
                is_top1[part] = logits.argmax(-1) == wanted[:, 0]
            all_logprobs = torch.log_softmax(logits, -1)
            logprobs[part] = all_logprobs.gather(1, wanted)[:, 0]
            probabilities = torch.exp(all_logprobs, out=logits)
            entropies[part] = -torch.linalg.vecdot(probabilities, all_logprobs)
            if any(ctx.needs_input_grad):
                probabilities.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))
            if direction is not None:
                torch.mm(probabilities.to(weight.dtype), weight, out=direction[part])
        ctx.save_for_backward(direction, *([hidden, probabilities] if any(head_trains) else []))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies, *([] if is_top1 is None else [is_top1]))
        return logprobs, entropies, is_top1

    @staticmethod
    def backward(ctx, grad_logprobs, *_):
        direction, *kept = ctx.saved_tensors
        factor = (grad_logprobs / -ctx.temperature)[:, None]
        gradients = [None if direction is None else (direction * factor).to(direction.dtype), None, None]
        if kept:
            hidden, probabilities = kept
            gradients[1] = probabilities.mT @ (hidden * factor) if ctx.needs_input_grad[1] else None
            gradients[2] = (probabilities.mT @ factor)[:, 0] if ctx.needs_input_grad[2] else None
        return *gradients, None, None, None
