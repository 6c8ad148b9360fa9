"""Memory of one process and FLOPs of one step, by what they are for."""

from dataclasses import dataclass

import torch
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from r1v_rl.models.logprobs import LOGITS_AT_ONCE, VOCABULARY_TILE, may_keep
from r1v_rl.plan.shape import BYTES, Shape
from r1v_rl.runtime import KEPT_PRODUCTS

ADAM_STATES = 2
SHARDED = {"weights": 3, "reference": 3, "gradients": 2, "optimizer": 1}
"""What is spread over the processes from which ZeRO stage on (FSDP: 3)."""
PRODUCT_BYTES = 0.6e6
"""Of one of oneDNN's kernels for a product in bfloat16, measured; float32 products are MKL's, which keeps none."""
HOLES = 0.35
"""On a CPU: what lies unused between a step's tensors at their peak, over these tensors, 0.3 to 0.45 measured."""
KERNEL_CODE = 0.06e9
"""What a CPU process maps of its libraries when products run for the first time, measured."""
_OF_A_STEP = ("weights, autocast", "activations", "backward, largest step", "oneDNN's kernels")
_FLOAT32 = BYTES["float32"]


@dataclass(frozen=True, slots=True)
class Work:
    """What one process runs in one micro-batch."""

    tokens: float
    """Through the language model, in one pass of mean size."""
    scored: float
    """Of them, positions whose logits are needed."""
    seen: float
    """Pairs of a token and one that it attends to."""
    visual: float
    """Visual tokens that the vision encoder makes."""
    passes: int = 1
    fullest: float = 1.0
    """Tokens of the fullest pass, over those of a mean one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a recipe trains."""

    trainable: tuple[str, ...]
    dtype: str
    """Of the weights, their gradients and the optimizer's states."""
    compute_dtype: str
    """Of activations: autocast's, where it is on."""
    checkpointing: bool
    has_reference: bool = False
    zero_stage: int = 0
    num_processes: int = 1
    accumulates: bool = False
    """Whether gradients are there already when a pass begins: there are several passes a step."""
    logprobs_only: bool = False
    """Whether the loss reads log-probabilities alone, and no entropy."""
    on_cpu: bool = False

    @property
    def trains_language(self) -> bool:
        return "language_model" in self.trainable


def memory_of(shape: Shape, work: Work, setting: Setting) -> dict[str, float]:
    """Bytes of one process: what they are for -> how many, at the start of the backward pass, where they are most.

    Without accumulation gradients come as activations go, so that only what is more than these counts.
    """
    weights = sum(shape.parameters.values()) * BYTES[setting.dtype]
    trained = sum(shape.parameters[part] for part in setting.trainable) * BYTES[setting.dtype]
    found: dict[str, float] = {"weights": weights}
    if setting.has_reference:
        found["reference"] = weights
    if copies := _autocast_copies(shape, setting):
        found["weights, autocast"] = copies
    layer = shape.layer_bytes(setting.dtype, setting.compute_dtype, trained=setting.trains_language)
    stream = shape.hidden * BYTES[setting.dtype]
    kept = shape.layers * stream + layer if setting.checkpointing else shape.layers * layer
    kept += shape.outer_bytes(setting.dtype, setting.compute_dtype, trained=setting.trains_language)
    activations = kept * work.tokens * work.fullest
    if "vision_encoder" in setting.trainable:
        activations += work.visual * shape.patches * shape.vision_bytes(setting.dtype, setting.compute_dtype)
    found |= {"gradients": trained, "optimizer": ADAM_STATES * trained}
    for name, stage in SHARDED.items():
        if name in found and setting.zero_stage >= stage:
            found[name] /= setting.num_processes
    if not setting.accumulates:
        found["gradients"] = max(0.0, found["gradients"] - activations)
    # the head's backward pass comes first, then that of a layer, whose gradients are as large as what it kept
    largest = max(_head_bytes(shape, work, setting), layer * work.tokens * work.fullest)
    found |= {"activations": activations, "backward, largest step": largest}
    if setting.on_cpu:
        if setting.compute_dtype == "bfloat16":
            found["oneDNN's kernels"] = KEPT_PRODUCTS * PRODUCT_BYTES
        found["between tensors"] = HOLES * sum(found.get(name, 0.0) for name in _OF_A_STEP)
    return found


def _autocast_copies(shape: Shape, setting: Setting) -> float:
    """Weights of the language model's layers in autocast's dtype, held by its graph; FSDP2 and ZeRO-3 cast shards."""
    if setting.dtype == setting.compute_dtype or setting.zero_stage == max(SHARDED.values()):
        return 0.0
    if setting.checkpointing and not setting.trains_language:  # cast anew in every layer, and dropped with it
        return 0.0
    return shape.layer_weights * BYTES[setting.compute_dtype]


def _scores_once(shape: Shape, work: Work, setting: Setting) -> bool:
    """Whether the LM head has its gradient with its logits, and computes them no second time."""
    logits, dtype = work.scored * work.fullest * shape.vocabulary, getattr(torch, setting.compute_dtype)
    return setting.logprobs_only and (not setting.trains_language or may_keep(logits, dtype))


def _head_bytes(shape: Shape, work: Work, setting: Setting) -> float:
    """The LM head's pass over the scored positions, a tile of the vocabulary at a time, and its weights' gradient.

    On a GPU a tile is one tensor in the compute dtype. Without Triton (on a CPU) TRL's backward pass keeps seven
    float32 tensors of a tile and a mask beside it. Where logits are computed once there are two float32 tensors of at
    most `LOGITS_AT_ONCE`, and one in a compute dtype that is another.
    """
    compute, scored = BYTES[setting.compute_dtype], work.scored * work.fullest
    gradient = shape.vocabulary * shape.hidden * _FLOAT32 if setting.trains_language else 0
    if _scores_once(shape, work, setting):
        narrow = 0 if setting.compute_dtype == "float32" else compute
        return min(scored * shape.vocabulary, LOGITS_AT_ONCE) * (2 * _FLOAT32 + narrow) + gradient
    tile = min(scored, TOKEN_CHUNK_SIZE) * min(shape.vocabulary, VOCABULARY_TILE)
    return tile * (compute + (7 * _FLOAT32 + 1 if setting.on_cpu else 0)) + gradient


def features_memory(shape: Shape, visual: float, dtype: str, limit: float) -> float:
    """Bytes that a cache of the frozen tower's features takes for so many visual tokens."""
    return min(limit, visual * shape.patches * shape.vision_hidden * BYTES[dtype])


def flops_of(shape: Shape, work: Work, setting: Setting) -> dict[str, float]:
    """FLOPs of one micro-batch on one process: what they are for -> how many.

    A backward pass is twice the forward where weights train, once where only activations' gradients are needed; the LM
    head's computes its logits again, unless they are kept. A frozen tower is run forward alone; its attention is left
    out.
    """
    forward = shape.trunk_flops(work.tokens, work.seen) * work.passes
    again = setting.checkpointing + (2 if setting.trains_language else 1)
    tower = 3 if "vision_encoder" in setting.trainable else 1
    reference = forward if setting.has_reference else 0.0
    head = 1 + setting.trains_language + (1 if _scores_once(shape, work, setting) else 2)
    return {
        "vision encoder": tower * shape.vision_flops(work.visual),
        "language model, forward": forward + reference,
        "language model, backward": again * forward,
        "LM head": (head + setting.has_reference) * shape.head_flops(work.scored * work.passes),
    }
