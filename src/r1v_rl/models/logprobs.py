"""Log-probabilities and entropies at chosen positions only, through the model's own (possibly wrapped) forward."""

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

from r1v_rl.models.vision import VisionOnce

_VOCABULARY_TILE = 32768


@dataclass(slots=True)
class Scored:
    """What to score: the flattened position that predicts each token, and the token."""

    positions: Int[Tensor, " M"]
    """Index into the flattened (B * T) positions; the position before the token."""
    targets: Int[Tensor, " M"]
    image_rows: Int[Tensor, " R"] | None
    """For each tile slot of the batch, in order, the row of `pixel_values` that fills it; None = one to one."""


@dataclass(slots=True)
class TokenScores:
    """Per scored token, float32."""

    logprobs: Float[Tensor, " M"]
    entropies: Float[Tensor, " M"]
    is_top1: Bool[Tensor, " M"] | None = None
    """Whether no other token is likelier; None unless the head was told to look."""


def add_logprob_head(
    model: PreTrainedModel, *, temperature: float, float32_head: bool, with_top1: bool = False
) -> None:
    """Teach `model` the call `model(scored=Scored(...), **inputs) -> TokenScores`.

    The logits of the scored positions alone are computed, in tiles (TRL's chunked kernel), and never stored. The call
    goes through `forward`, so DDP, FSDP and DeepSpeed wrappers see it; without `scored` the forward is the original,
    and generation is unchanged. Call it before PEFT wraps the model.

    Args:
        model: A transformers causal or image-text model.
        temperature: Logits are divided by it, as in the sampler.
        float32_head: Run the LM head in float32.
        with_top1: Fill `TokenScores.is_top1`.
    """
    outputs = ("log_probs", "entropy", "is_top1") if with_top1 else ("log_probs", "entropy")
    original = model.forward
    text_config = model.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    vision = VisionOnce(model)

    @functools.wraps(type(model).forward)
    def forward(self, *args, scored: Scored | None = None, **kwargs):
        if scored is None:
            return original(*args, **kwargs)
        with vision.repeated(scored.image_rows):
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[scored.positions]
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden + _no_gradient(self)
        head = self.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False) if float32_head else nullcontext():
            logprobs, entropies, _, _, is_top1 = ChunkedLogProbFunction.apply(
                hidden.float() if float32_head else hidden,
                head.weight,
                head.bias,
                scored.targets,
                temperature,
                _VOCABULARY_TILE,
                softcap,
                1.0,
                outputs,
            )
        return TokenScores(logprobs, entropies, is_top1)

    model.forward = types.MethodType(forward, model)


def _no_gradient(model: PreTrainedModel) -> Tensor | float:
    """Zero, with a gradient of zero: a batch without pictures where the projector alone trains."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return 0.0 * torch.stack([p.sum() for p in trainable]).sum() if trainable else 0.0
