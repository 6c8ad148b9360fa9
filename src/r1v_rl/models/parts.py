"""The three parts of a vision-language model, by parameter name, and which of them train."""

import re

from torch import nn

from r1v_rl.state_files import weight_hash

PARTS = ("vision_encoder", "projector", "language_model")

_PATTERNS = (
    (
        "projector",
        re.compile(r"(^|\.)(multi_modal_projector|image_newline|visual\.(deepstack_)?merger\w*|connector|mlp1)\."),
    ),
    ("vision_encoder", re.compile(r"(^|\.)(vision_tower|visual|vision_model)\.")),
    ("language_model", re.compile(r"(^|\.)(language_model|text_model|lm_head)\.")),
)


def part_of(name: str) -> str:
    """The part (`PARTS`) that a parameter or module of this dotted name belongs to.

    Raises:
        ValueError: If no part claims it, which means that the model family is unknown.
    """
    dotted = name + "."
    for part, pattern in _PATTERNS:
        if pattern.search(dotted):
            return part
    raise ValueError(f"`{name}` belongs to none of {PARTS}: this model family is not known")


def part_hashes(model: nn.Module) -> dict[str, str]:
    """`weight_hash` of each part (`PARTS`) of a model that no wrapper hides; a frozen part keeps its own for ever."""
    weights = model.state_dict()
    return {part: weight_hash({n: w for n, w in weights.items() if part_of(n) == part}) for part in PARTS}


def freeze_all_but(model: nn.Module, trainable: list[str]) -> None:
    """Let the gradients of the named parts flow, and of no other parameter."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)


def part_module(model: nn.Module, part: str) -> nn.Module:
    """The outermost module that holds this part (without the LM head)."""
    for name, module in model.named_modules():
        if name and "." + name.rsplit(".", 1)[-1] != ".lm_head" and _is_part_root(name, part):
            return module
    raise ValueError(f"the model has no {part}")


def encoder_modules(model: nn.Module) -> list[nn.Module]:
    """The vision encoder; its outermost modules that hold nothing of the projector, where that lies inside of it."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if not name or inside or isinstance(module, nn.ModuleList) or not _is_part_root(name, "vision_encoder"):
            continue
        if all(part_of(f"{name}.{inner}") == "vision_encoder" for inner, _ in module.named_parameters()):
            found[name] = module
    return list(found.values())


def _is_part_root(name: str, part: str) -> bool:
    try:
        return part_of(name) == part
    except ValueError:
        return False
