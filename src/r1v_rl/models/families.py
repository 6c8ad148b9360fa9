"""What differs between the families of vision-language models: picture inputs, token positions, unlike pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from r1v_rl.errors import UserError
from r1v_rl.models.parts import part_module

SUPPORTED_MODEL_TYPES = ("internvl", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
"""`model_type` of the models that the trainers know, tested."""
VISION_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")
"""What the models take of pictures. Other outputs of a processor repeat what the token ids say."""


def check_family(path: str) -> None:
    """Refuse a model that the trainers do not know.

    Raises:
        UserError: If its family is not supported, or its vision encoder takes pictures that cannot be stacked.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UserError(f"`{path}` is a `{config.model_type}` model; the trainers know {known}")
    if config.vision_config.model_type == "pixtral":
        raise UserError(
            f"the vision encoder of `{path}` is a `pixtral`, whose pictures have no common size; the trainers know "
            f"`llava` models with CLIP or SigLIP"
        )


def vision_inputs(processed: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model takes of a processor's output."""
    return {name: torch.as_tensor(processed[name]) for name in VISION_INPUTS if name in processed}


def num_units(inputs: Mapping[str, Any]) -> int:
    """Into how many pieces the model cuts the features of these pictures: tiles (InternVL), else pictures."""
    return len(inputs.get("image_grid_thw", inputs.get("pixel_values", ())))


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The vision inputs of several prompts as those of one batch; prompts without pictures have none."""
    found: dict[str, Tensor] = {}
    for name in VISION_INPUTS:
        tensors = [part[name] for part in parts if name in part]
        if tensors and tensors[0].ndim == 5:  # (pictures, tiles, 3, height, width): padded to the most tiles
            most = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.nn.functional.pad(t, (0, 0) * 3 + (0, most - t.shape[1])) for t in tensors]
        if tensors:
            found[name] = torch.cat(tensors)
    return found


def repeat_features(outputs: Any, rows: Tensor) -> None:
    """In the outputs of `get_image_features`, let piece `rows[i]` be the i-th one (`num_units`); no rows, no features,
    and gradients of zero."""
    features = outputs.pooler_output
    if isinstance(features, Tensor):
        outputs.pooler_output = features[rows]
        return
    order = rows.tolist()
    outputs.pooler_output = [features[i] for i in order] or [features[0][:0]]
    if deepstack := getattr(outputs, "deepstack_features", None):  # added to the language model's first layers
        pieces = [layer.split([len(piece) for piece in features]) for layer in deepstack]
        outputs.deepstack_features = [torch.cat([layer[0][:0], *(layer[i] for i in order)]) for layer in pieces]


def why_no_features(model: Any) -> str | None:
    """Why the output of the vision encoder of `model` cannot take the place of pixels, in words; None where it can."""
    config = model.config
    if getattr(config, "vision_config", None) is None:
        return "it has no vision encoder"
    if part_module(model, "projector") in set(part_module(model, "vision_encoder").modules()):
        return "its projector lies inside of its vision encoder"
    if hasattr(config, "image_grid_pinpoints"):
        return "its pictures differ in their number of tiles"
    if not isinstance(config.vision_feature_layer, int):
        return f"its projector reads several layers of its vision encoder ({config.vision_feature_layer})"
    return None


def projector_input(config: Any, encoder: Any, pixels: Tensor) -> Float[Tensor, "K tokens hidden"]:
    """What the projector reads of K tiles; of a model for which `why_no_features` is None."""
    if config.model_type == "internvl" and config.vision_feature_layer == -1:
        return encoder(pixel_values=pixels).last_hidden_state
    return encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]


def as_encoder_output(config: Any, features: Float[Tensor, "K tokens hidden"]) -> BaseModelOutputWithPooling:
    """An output of the vision encoder of which the projector reads these `projector_input` features."""
    layers = {config.vision_feature_layer: features}
    return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=layers)  # type: ignore[arg-type]


def token_positions(
    model: Any, sequences: Sequence[Sequence[int]], image_grid_thw: Tensor | None
) -> list[Int[Tensor, "3 L"]] | None:
    """Positions (time, height, width) of each sequence's tokens, as the model itself counts them.

    Args:
        model: The policy, with or without an adapter.
        sequences: Token ids with one placeholder for each visual token.
        image_grid_thw: (pictures, 3), in the order of their placeholders; None = no pictures.

    Returns:
        One tensor a sequence, on the CPU; None where positions are 0, 1, 2, ...
    """
    backbone = _counts_in_three_axes(model)
    if image_grid_thw is None or backbone is None:
        return None
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    mask = pad_sequence([torch.ones(len(sequence), dtype=torch.long) for sequence in sequences], batch_first=True)
    positions, _ = backbone.get_rope_index(
        ids, attention_mask=mask, image_grid_thw=image_grid_thw.cpu(), **token_types(model, ids)
    )
    return [positions[:, row, : len(sequence)] for row, sequence in enumerate(sequences)]


def token_types(model: Any, input_ids: Int[Tensor, "B T"]) -> dict[str, Int[Tensor, "B T"]]:
    """`mm_token_type_ids` (1 on visual tokens) for a model that counts positions by them; nothing for the others."""
    if _counts_in_three_axes(model) is None:
        return {}
    return {"mm_token_type_ids": (input_ids == model.config.image_token_id).int()}


def _counts_in_three_axes(model: Any) -> Any | None:
    """The model without its head and its adapter, if its positions have three axes."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.base_model if hasattr(whole.base_model, "get_rope_index") else None
