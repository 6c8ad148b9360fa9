"""The vision encoders that fit InternVL's vision model, loaded as one: InternViT, and DINOv2 weight for weight."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Dinov2Model, InternVLVisionConfig, InternVLVisionModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from r1v_rl.errors import UserError
from r1v_rl.models.weight_files import load_weights

DINOV2_IMAGE_SIZE = 224
"""DINOv2's own 518 px are 37 patches a side, which no pixel shuffle halves; 224 px, its training size, are 16."""

MISFITS = {
    "siglip": "it has no class token, and InternVL's vision model puts one before the patches, each of which attends "
    "to it: no weights make that token vanish. transformers and vLLM run SigLIP in the LLaVA and Idefics3 families",
    "clip": "it normalises its embeddings before the first layer, where InternVL's vision model has no layer",
    "dinov2_with_registers": "its register tokens stand between class token and patches, where InternVL has none; take "
    "DINOv2 without registers",
}
"""Encoders that users try, and why none of their weights can be arranged to give the same features."""


def load_vision_encoder(
    vision_encoder: str | Path | PreTrainedModel, image_size: int | None = None
) -> InternVLVisionModel:
    """The encoder as an `InternVLVisionModel` for square pictures of image_size, in float32, with its own features.

    Args:
        vision_encoder: Folder, hub id or model: an `InternVLVisionModel`, the tower of a whole InternVL, or a DINOv2.
        image_size: Side of a picture (a tile) in pixels; the position table is interpolated to it. Unset: the
            encoder's own, and 224 for DINOv2.

    Raises:
        UserError: If the encoder does not fit, with the reason.
    """
    if isinstance(vision_encoder, PreTrainedModel):
        encoder, kind = vision_encoder, vision_encoder.config.model_type
    else:
        kind = encoder_type(vision_encoder)
        encoder = _load(kind, vision_encoder)
    if kind == "dinov2":
        return _from_dinov2(encoder, image_size or DINOV2_IMAGE_SIZE)
    if image_size is not None and list(encoder.config.image_size) != [image_size, image_size]:
        return _resized(encoder, image_size)
    return encoder


def vision_config(vision_encoder: str | Path, image_size: int | None = None) -> InternVLVisionConfig:
    """The configuration of what `load_vision_encoder` gives, from the folder's own, without weights."""
    kind, config = encoder_type(vision_encoder), AutoConfig.from_pretrained(vision_encoder)
    if kind == "dinov2":
        return _config_of_dinov2(config, image_size or DINOV2_IMAGE_SIZE)
    config = config.vision_config if kind == "internvl" else config
    return config if image_size is None else _config_resized(config, image_size)


def pixel_statistics(encoder: str) -> dict[str, list[float]]:
    """Mean and deviation of each colour that the encoder was trained with: its own preprocessor's, else ImageNet's."""
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(encoder) if encoder else ({}, {})
    except (OSError, ValueError):
        settings = {}
    return {
        "image_mean": list(settings.get("image_mean") or IMAGENET_DEFAULT_MEAN),
        "image_std": list(settings.get("image_std") or IMAGENET_DEFAULT_STD),
    }


def encoder_type(folder: str | Path) -> str:
    """The model type of an encoder that fits; refuses others with the reason."""
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise UserError(
            f"`vision_encoder` must be a model folder or hub id (a published InternViT or internvl_chat checkpoint is "
            f"converted first: `r1v-rl convert`); {folder} cannot be read: {error}"
        ) from error
    _refuse_misfit(kind, folder)
    return kind


def _refuse_misfit(kind: str, name: Any) -> None:
    if kind in ("internvl_vision", "internvl", "dinov2"):
        return
    reason = MISFITS.get(kind.removesuffix("_model").removesuffix("_vision"), "its layers are other ones")
    raise UserError(
        f"`vision_encoder` must be an InternViT (`internvl_vision`), a whole `internvl` whose tower is taken, or a "
        f"`dinov2`; {name} is a `{kind}`: {reason}"
    )


def _load(kind: str, folder: str | Path) -> PreTrainedModel:
    if kind == "dinov2":
        return load_weights(Dinov2Model, folder, dtype="float32")
    if kind == "internvl_vision":
        return load_weights(InternVLVisionModel, folder, dtype="float32")
    config = AutoConfig.from_pretrained(folder).vision_config
    tower = {r"^(model\.)?vision_tower\.": ""}
    return load_weights(InternVLVisionModel, folder, config=config, key_mapping=tower, dtype="float32")


def _from_dinov2(dinov2: PreTrainedModel, image_size: int) -> InternVLVisionModel:
    """Every tensor under InternVL's name; the features of `dinov2` at this size, its final norm included."""
    encoder = InternVLVisionModel(_config_of_dinov2(dinov2.config, image_size))
    state = {_internvl_name(name): tensor for name, tensor in dinov2.state_dict().items() if "mask_token" not in name}
    state["embeddings.position_embeddings"] = _positions(dinov2, image_size, dinov2.config.patch_size)
    encoder.load_state_dict(state)
    encoder.name_or_path = dinov2.name_or_path
    return encoder.eval()


def _config_of_dinov2(config: Any, image_size: int) -> InternVLVisionConfig:
    if config.use_swiglu_ffn:
        raise UserError(
            "this DINOv2 has gated feed-forward layers (the giant one), which InternVL's vision model lacks"
        )
    return InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        attention_bias=config.qkv_bias,
        norm_type="layer_norm",
        use_qk_norm=False,
        use_mean_pooling=False,  # which is what puts the final norm in
        layer_scale_init_value=config.layerscale_value,
        num_channels=config.num_channels,
        patch_size=config.patch_size,
        image_size=image_size,
    )


def _config_resized(config: Any, image_size: int) -> InternVLVisionConfig:
    return InternVLVisionConfig(**config.to_dict() | {"image_size": [image_size, image_size]})


_DINOV2_NAMES = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.projection_layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".layer_scale1.lambda1": ".lambda_1",
    ".layer_scale2.lambda1": ".lambda_2",
}


def _internvl_name(name: str) -> str:
    for theirs, ours in _DINOV2_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _resized(encoder: PreTrainedModel, image_size: int) -> InternVLVisionModel:
    """The same encoder for other pictures: only the position table changes."""
    (patch, _) = encoder.config.patch_size
    resized = InternVLVisionModel(_config_resized(encoder.config, image_size))
    positions = _positions(encoder, image_size, patch)
    resized.load_state_dict(encoder.state_dict() | {"embeddings.position_embeddings": positions})
    resized.name_or_path = encoder.name_or_path
    return resized.eval()


@torch.no_grad()
def _positions(encoder: PreTrainedModel, image_size: int, patch: int) -> Tensor:
    """The position table for this size, (1, 1 + patches, hidden), by the encoder's own interpolation."""
    if image_size % patch:
        raise UserError(f"`image_size` must be a multiple of the encoder's patch of {patch} px, received {image_size}")
    tokens = torch.empty(1, 1 + (image_size // patch) ** 2, encoder.config.hidden_size)
    return encoder.embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
