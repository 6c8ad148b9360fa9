"""A picture that no token looks at, for batches without pictures."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from r1v_rl.models.families import vision_inputs
from r1v_rl.models.logprobs import Scored
from r1v_rl.models.parts import part_of
from r1v_rl.models.vision_features import VisionFeatures

_SIDE = 32


class BlankPicture:
    """Lets a batch without pictures call the modules that a batch with pictures calls.

    Processes exchange gradients, and with FSDP2 and ZeRO-3 weights, module by module: one that leaves out encoder and
    projector would wait for the others, and they for it. The features of this picture fill no place, so that its
    gradients are zeros: and zeros, with which Adam's momentum goes on, are what one process must have too, if it is to
    take the steps of several.

    Args:
        processor: The one that prompts are encoded with.
        device: Of the model.
        features: What runs the frozen encoder ahead; None where the model's own forward runs it.
    """

    def __init__(self, processor: Any, device: torch.device, features: VisionFeatures | None = None):
        picture = Image.new("RGB", (_SIDE, _SIDE))
        taken = vision_inputs(processor.image_processor(images=[picture], return_tensors="pt"))
        self._inputs = {name: tensor.to(device) for name, tensor in taken.items()}
        self._features = features

    @staticmethod
    def is_needed(model: nn.Module, *, shards: bool) -> bool:
        """Whether encoder or projector train, or the weights are spread over processes."""
        if getattr(model.config, "vision_config", None) is None:
            return False
        return shards or any(p.requires_grad and part_of(n) != "language_model" for n, p in model.named_parameters())

    def add_to(self, kwargs: dict[str, Any], scored: Scored) -> None:
        """Make it part of a batch; one that has pictures is left alone."""
        if "pixel_values" in kwargs:
            return
        if self._features is not None and self._inputs["pixel_values"].ndim == 4:
            self._inputs["pixel_values"] = self._features.of(self._inputs["pixel_values"], [])
        kwargs |= self._inputs
        scored.image_rows = torch.zeros(0, dtype=torch.long, device=kwargs["input_ids"].device)
        if "image_grid_thw" in kwargs and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _in_order(kwargs["input_ids"])


def _in_order(input_ids: Tensor) -> Tensor:
    """0, 1, 2, ... on three axes, which the model would not count by itself in the presence of a picture."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
