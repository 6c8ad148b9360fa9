"""The vision tower runs once per unique image, and without a graph where it is frozen."""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from r1v_rl.models.parts import part_module


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
                outputs.pooler_output = outputs.pooler_output[self._rows]
            return outputs

        backbone.get_image_features = types.MethodType(get_image_features, backbone)
        run_without_graph_where_frozen(part_module(model, "vision_encoder"))

    @contextmanager
    def repeated(self, rows: Tensor | None) -> Iterator[None]:
        """Within it, feature row `rows[i]` fills the i-th tile slot of the batch."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None


def run_without_graph_where_frozen(tower: nn.Module) -> None:
    """A tower without a trainable parameter runs in eval mode under `no_grad`, whatever hooks gradient checkpointing
    has put on its embeddings."""
    original = tower.forward

    def forward(module, *args, **kwargs):
        if any(parameter.requires_grad for parameter in module.parameters()):
            return original(*args, **kwargs)
        if module.training:
            module.eval()
        with torch.no_grad():
            return original(*args, **kwargs)

    tower.forward = types.MethodType(forward, tower)


class FeatureCache:
    """What a frozen vision encoder sees in each picture, computed at first use and kept in main memory.

    The model then takes the kept features in the place of pixels: its encoder hands on what has three dimensions.
    """

    def __init__(self, model: Any):
        self._tower = part_module(model, "vision_encoder")
        if any(parameter.requires_grad for parameter in self._tower.parameters()):
            raise ValueError("features can be kept for a frozen vision encoder only")
        self._features: dict[int, Tensor] = {}
        original = self._tower.forward

        def forward(module, *args, pixel_values: Tensor, **kwargs):
            if pixel_values.ndim == 3:
                return BaseModelOutputWithPooling(last_hidden_state=pixel_values)
            return original(*args, pixel_values=pixel_values, **kwargs)

        self._tower.forward = types.MethodType(forward, self._tower)

    def __len__(self) -> int:
        return len(self._features)

    def of(
        self,
        images: Sequence[int],
        read: Callable[[Sequence[int]], Tensor],
        num_tiles: Callable[[int], int],
        device: torch.device,
    ) -> Tensor:
        """Features of these pictures, all tiles in order, (tiles, tokens, hidden), on `device`.

        Args:
            images: Numbers of pictures.
            read: Pictures -> their pixels, (tiles, 3, height, width); called for those not seen before.
            num_tiles: Picture -> its tiles.
        """
        missing = [image for image in images if image not in self._features]
        if missing:
            dtype = next(self._tower.parameters()).dtype
            pixels = read(missing).to(device, dtype)
            features = self._tower(pixel_values=pixels).last_hidden_state.to("cpu")
            # copies, so that a kept picture does not hold the whole batch it came with
            parts = features.split([num_tiles(image) for image in missing])
            self._features |= {image: part.clone() for image, part in zip(missing, parts, strict=True)}
        return torch.cat([self._features[image] for image in images]).to(device)
