"""The vision tower runs once per unique image, and without a graph where it is frozen."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r1v_rl.models.families import as_encoder_output, repeat_features
from r1v_rl.models.parts import encoder_modules


class VisionOnce:
    """Hands every row of a group the features of one image, computed once.

    transformers' models take one image per placeholder run, so G completions of one prompt would need G copies of the
    pixels and G passes of the tower. Here the model gets the unique pixels, and its own `get_image_features` is
    followed by an index that repeats the *features*; the gradients of all copies add up in it.
    """

    def __init__(self, model: Any):
        self._rows: Tensor | None = None
        backbone = model.base_model
        if not hasattr(backbone, "get_image_features"):
            return  # a text-only model
        original = backbone.get_image_features

        def get_image_features(module, *args, **kwargs):
            outputs = original(*args, **kwargs)
            if self._rows is not None:
                repeat_features(outputs, self._rows)
            return outputs

        backbone.get_image_features = types.MethodType(get_image_features, backbone)
        for module in encoder_modules(model):
            run_without_graph_where_frozen(module, model.config)

    @contextmanager
    def repeated(self, rows: Tensor | None) -> Iterator[None]:
        """Within it, feature row `rows[i]` fills the i-th tile slot of the batch."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None


def run_without_graph_where_frozen(tower: nn.Module, config: Any) -> None:
    """A vision encoder, or a module of one, without a trainable parameter runs in eval mode under `no_grad`, whatever
    hooks gradient checkpointing has put on its embeddings. Given features (tiles, tokens, hidden) for pixels, an
    encoder hands them on; `config` is that of the whole model."""
    original, takes_pixels = tower.forward, isinstance(tower, PreTrainedModel)

    def forward(module, *args, **kwargs):
        pixels = args[0] if args else kwargs.get("pixel_values")
        if takes_pixels and pixels is not None and pixels.ndim == 3:
            return as_encoder_output(config, pixels)
        if trains():
            return original(*args, **kwargs)
        if module.training:
            module.eval()
        with torch.no_grad():
            return original(*args, **kwargs)

    def trains() -> bool:
        return any(parameter.requires_grad for parameter in tower.parameters())

    def train(module, mode: bool = True):
        return original_train(mode and trains())  # a layer in training mode is checkpointed before its forward runs

    original_train = tower.train
    tower.forward = types.MethodType(forward, tower)
    tower.train = types.MethodType(train, tower)  # type: ignore[method-assign]
    tower.train(tower.training)
