"""Names and arrangements of weights: the published `internvl_chat` layout beside transformers' InternVL.

One table for both directions. `qkv` of a vision layer is one tensor there and three here. With `ps_version` v1 the
pixel shuffle leaves the visual tokens in transposed order, which transformers' InternVL cannot do; the same logits come
from it when encoder and projector are arranged for transposed tiles (`arrange_for_transposed_tiles`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_VISION = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
}
_VISION_LAYER = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = {"attention.q_proj": 0, "attention.k_proj": 1, "attention.v_proj": 2}
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}

_ON_DISK = (
    (re.compile(r"^(model\.)?vision_tower\."), "vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
)
_IN_MEMORY = (
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


@dataclass
class WeightStep:
    """One tensor to be written, and what it is made of."""

    name: str
    sources: list[str]
    part: int | None = None
    """Which third of the source, where a `qkv` is split."""
    shape: tuple[int, ...] = field(default=())


def disk_name(name: str) -> str:
    """A parameter's name in transformers' files, from its name in the model or in files of either kind."""
    return _renamed(name, _ON_DISK)


def memory_name(name: str) -> str:
    """A parameter's name in the model, from its name in transformers' files."""
    return _renamed(name, _IN_MEMORY)


def chat_name(name: str) -> tuple[str | None, int | None]:
    """(name in `internvl_chat`, which third of it) of a name in transformers' files; (None, None) if it has none."""
    if name.startswith("language_model."):
        return name, None
    module, _, rest = name.partition(".")
    if module == "multi_modal_projector":
        layer, _, kind = rest.rpartition(".")
        return (f"{_PROJECTOR[layer]}.{kind}", None) if layer in _PROJECTOR else (None, None)
    if module != "vision_tower":
        return None, None
    if match := re.match(r"encoder\.layer\.(\d+)\.(.+)$", rest):
        number, inner = match.groups()
        layer, _, kind = inner.rpartition(".")
        prefix = f"vision_model.encoder.layers.{number}"
        if layer in _QKV:
            return f"{prefix}.attn.qkv.{kind}", _QKV[layer]
        if inner in _VISION_LAYER:
            return f"{prefix}.{_VISION_LAYER[inner]}", None
        return (f"{prefix}.{_VISION_LAYER[layer]}.{kind}", None) if layer in _VISION_LAYER else (None, None)
    layer, _, kind = rest.rpartition(".")
    if rest in _VISION:
        return f"vision_model.{_VISION[rest]}", None
    return (f"vision_model.{_VISION[layer]}.{kind}", None) if layer in _VISION else (None, None)


def steps_to_transformers(shapes: dict[str, tuple[int, ...]]) -> list[WeightStep]:
    """What each of transformers' tensors is made of; `shapes` are those of the model, by name in its files."""
    steps = []
    for name, shape in shapes.items():
        source, part = chat_name(name)
        assert source is not None, f"transformers' InternVL has a weight that internvl_chat lacks: {name}"
        steps.append(WeightStep(name, [source], part, shape))
    return steps


def steps_to_chat(shapes: dict[str, tuple[int, ...]]) -> tuple[list[WeightStep], list[str]]:
    """What each of `internvl_chat`'s tensors is made of, and the names that have no place in it."""
    steps: dict[str, WeightStep] = {}
    homeless = []
    for name, shape in shapes.items():
        target, part = chat_name(name)
        if target is None:
            homeless.append(name)
        elif part is None:
            steps[target] = WeightStep(target, [name], None, shape)
        else:
            step = steps.setdefault(target, WeightStep(target, ["", "", ""], None, (3 * shape[0], *shape[1:])))
            step.sources[part] = name
    return list(steps.values()), homeless


def arrange_for_transposed_tiles(name: str, tensor: Tensor, downsample_ratio: float) -> Tensor:
    """The tensor (by its `internvl_chat` name) as it must be where every tile comes in with rows and columns swapped.

    Doing it twice gives the tensor back. A transposed tile, a transposed patch kernel and a transposed position table
    give transposed features, so that the v2 pixel shuffle yields the token order of v1; inside a visual token the
    patches then follow the other direction first.
    """
    if name.endswith("embeddings.patch_embedding.weight"):
        return tensor.transpose(-1, -2)
    if name.endswith("embeddings.position_embedding"):
        first, patches = tensor[:, :1], tensor[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        return torch.cat([first, grid], dim=1)
    if name in ("mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight"):
        factor = round(1 / downsample_ratio)
        return tensor.unflatten(-1, (factor, factor, -1)).transpose(-3, -2).flatten(-3)
    return tensor


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        if pattern.search(name):
            return pattern.sub(replacement, name)
    return name
