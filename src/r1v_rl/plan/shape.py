"""A model's sizes from its configuration: parameters of each part, and what a token costs in memory and FLOPs."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from r1v_rl.models.parts import PARTS, part_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a vision-language model."""

    parameters: dict[str, int]
    """Part (`models.parts.PARTS`) -> parameters; tied ones once."""
    embeddings: int
    """Of them, the input embeddings': looked up, not multiplied with."""
    layers: int
    hidden: int
    heads: int
    queries: int
    """Width of the queries of one layer."""
    key_values: int
    """Width of the keys of one layer; that of the values is the same."""
    mlp: int
    vocabulary: int
    patches: float
    """Of the vision encoder, for one visual token."""
    vision_hidden: int
    vision_layers: int = 0
    vision_mlp: int = 0

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
            text.num_attention_heads,
            head * text.num_attention_heads,
            head * text.num_key_value_heads,
            text.intermediate_size,
            text.vocab_size,
            _patches(config),
            config.vision_config.hidden_size,
            getattr(config.vision_config, "num_hidden_layers", 0) or getattr(config.vision_config, "depth", 0),
            config.vision_config.intermediate_size,
        )

    @property
    def layer_weights(self) -> int:
        """Parameters of the language model's layers: neither its embeddings nor its head."""
        return self.parameters["language_model"] - self.embeddings - self.vocabulary * self.hidden

    def layer_bytes(self, dtype: str, compute_dtype: str, *, trained: bool) -> int:
        """Bytes that one layer of the language model keeps of a token for its backward pass.

        Both norms keep their input in float32, or in its place what they normalised (`models.norms`), attention its
        queries, keys, values, output and log-sum-exp, the MLP its gate, the gate's SiLU and the up-projection. Weights
        that train need their inputs too: what the norms normalised, what the three products behind the first norm and
        the two behind the second read (autocast makes a copy for each of them, else they share it), and what the
        down-projection reads.
        """
        wide, compute = BYTES["float32"], BYTES[compute_dtype]
        kept = 2 * wide * self.hidden + wide * self.heads
        kept += compute * (2 * self.queries + 2 * self.key_values + 3 * self.mlp)
        if trained:
            inputs = 5 if dtype != compute_dtype else 2
            kept += 2 * self._normalised_bytes(dtype, compute_dtype) + compute * (inputs * self.hidden + self.mlp)
        return kept

    def _normalised_bytes(self, dtype: str, compute_dtype: str) -> int:
        """What a norm whose weight trains keeps beside its input; `models.norms`, for float32, keeps it alone."""
        return 0 if dtype == compute_dtype == "float32" else BYTES[dtype] * self.hidden

    def outer_bytes(self, dtype: str, compute_dtype: str, *, trained: bool) -> int:
        """Bytes that the rest of the language model keeps of a token: the last norm, and its place's sines, cosines."""
        norm = BYTES["float32"] * self.hidden + (self._normalised_bytes(dtype, compute_dtype) if trained else 0)
        return norm + 2 * BYTES["float32"] * self.queries // self.heads

    def vision_bytes(self, dtype: str, compute_dtype: str) -> int:
        """Bytes that a vision encoder that trains keeps of a patch: as `layer_bytes`, with LayerNorm (no normalised
        copy), a GELU between two products and two layer scales."""
        weight, compute = BYTES[dtype], BYTES[compute_dtype]
        inputs = 4 if dtype != compute_dtype else 2
        layer = 2 * weight * self.vision_hidden + compute * ((inputs + 6) * self.vision_hidden + 2 * self.vision_mlp)
        return self.vision_layers * layer

    def trunk_flops(self, tokens: float, seen: float) -> float:
        """Forward FLOPs of the language model without its head: `tokens` through the layers, `seen` pairs attended."""
        return 2 * self.layer_weights * tokens + 4 * self.layers * self.hidden * seen

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
