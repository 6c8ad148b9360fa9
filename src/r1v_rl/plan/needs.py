"""Memory of one process and FLOPs of one step, by what they are for."""

from dataclasses import dataclass

from r1v_rl.plan.shape import Shape

ADAM_STATES = 2
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARDED = {"weights": 3, "reference": 3, "gradients": 2, "optimizer": 1}
"""What is spread over the processes from which ZeRO stage on (FSDP: 3)."""
HEAD_TILE = 32768
"""Words of the vocabulary whose logits are in memory at once, and three tensors of them in the backward pass."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one process runs in one micro-batch, its passes all alike."""

    tokens: float
    """Through the language model, in one pass."""
    scored: float
    """Of them, positions whose logits are needed."""
    seen: float
    """Pairs of a token and one that it attends to."""
    visual: float
    """Visual tokens that the vision encoder makes."""
    passes: int = 1


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


def memory_of(shape: Shape, work: Work, setting: Setting) -> dict[str, float]:
    """Bytes of one process: what they are for -> how many, at the start of the backward pass, where they are most."""
    weights = sum(shape.parameters.values()) * BYTES[setting.dtype]
    trained = sum(shape.parameters[part] for part in setting.trainable) * BYTES[setting.dtype]
    kept = shape.activations(checkpointing=setting.checkpointing) * BYTES[setting.compute_dtype]
    found: dict[str, float] = {"weights": weights}
    if setting.has_reference:
        found["reference"] = weights
    found |= {"gradients": trained, "optimizer": ADAM_STATES * trained}
    for name, stage in SHARDED.items():
        if name in found and setting.zero_stage >= stage:
            found[name] /= setting.num_processes
    logits = 3 * work.scored * min(shape.vocabulary, HEAD_TILE) * BYTES["float32"]
    one_layer = shape.activations(checkpointing=False) / shape.layers * BYTES[setting.compute_dtype]  # its gradients
    return {**found, "activations": (kept + one_layer) * work.tokens, "logits": logits}


def features_memory(shape: Shape, visual: float, dtype: str, limit: float) -> float:
    """Bytes that a cache of the frozen tower's features takes for so many visual tokens."""
    return min(limit, visual * shape.patches * shape.vision_hidden * BYTES[dtype])


def flops_of(shape: Shape, work: Work, setting: Setting) -> dict[str, float]:
    """FLOPs of one micro-batch on one process: what they are for -> how many.

    A backward pass is twice the forward where weights train, once where only activations' gradients are needed; the LM
    head's computes its logits again. A frozen tower is run forward alone; its attention is left out.
    """
    forward = shape.trunk_flops(work.tokens, work.seen) * work.passes
    again = setting.checkpointing + (2 if "language_model" in setting.trainable else 1)
    tower = 3 if "vision_encoder" in setting.trainable else 1
    reference = forward if setting.has_reference else 0.0
    return {
        "vision encoder": tower * shape.vision_flops(work.visual),
        "language model, forward": forward + reference,
        "language model, backward": again * forward,
        "LM head": (4 + setting.has_reference) * shape.head_flops(work.scored * work.passes),
    }
