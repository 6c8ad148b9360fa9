"""A model's sizes from its configuration: parameters of each part, and what a token costs in memory and FLOPs."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from r1v_rl.models.parts import PARTS, part_of


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a vision-language model."""

    parameters: dict[str, int]
    """Part (`models.parts.PARTS`) -> parameters; tied ones once."""
    embeddings: int
    """Of them, the input embeddings': looked up, not multiplied with."""
    layers: int
    hidden: int
    key_values: int
    """Width of the keys of one layer; that of the values is the same."""
    mlp: int
    vocabulary: int
    patches: float
    """Of the vision encoder, for one visual token."""
    vision_hidden: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of a transformers configuration; no weights are made."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        parameters = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            parameters[part_of(name)] += parameter.numel()
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        embeddings = model.get_input_embeddings().weight
        is_tied = model.get_output_embeddings().weight is embeddings
        return cls(
            parameters,
            0 if is_tied else embeddings.numel(),
            text.num_hidden_layers,
            text.hidden_size,
            head * text.num_key_value_heads,
            text.intermediate_size,
            text.vocab_size,
            _patches(config),
            config.vision_config.hidden_size,
        )

    def activations(self, *, checkpointing: bool) -> int:
        """Numbers of one token that the language model keeps for its backward pass.

        A layer keeps its two norms' inputs, normalised values and outputs, queries, keys, values, the attention's
        output, and four of the MLP's width (gate, its SiLU, up, their product). With checkpointing a layer keeps its
        input, and one layer at a time the rest.
        """
        layer = 8 * self.hidden + 2 * self.key_values + 4 * self.mlp
        return self.layers * self.hidden + layer if checkpointing else self.layers * layer

    def trunk_flops(self, tokens: float, seen: float) -> float:
        """Forward FLOPs of the language model without its head: `tokens` through the layers, `seen` pairs attended."""
        head = self.vocabulary * self.hidden
        weights = self.parameters["language_model"] - self.embeddings - head
        return 2 * weights * tokens + 4 * self.layers * self.hidden * seen

    def head_flops(self, positions: float) -> float:
        """Forward FLOPs of the LM head."""
        return 2 * self.vocabulary * self.hidden * positions

    def vision_flops(self, visual: float) -> float:
        """Forward FLOPs of the vision encoder for so many visual tokens, its attention left out."""
        return 2 * self.parameters["vision_encoder"] * self.patches * visual


def _patches(config: Any) -> float:
    """Patches that one visual token is made of."""
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:
        return ratio**-2
    return float(getattr(config.vision_config, "spatial_merge_size", 1) ** 2)
