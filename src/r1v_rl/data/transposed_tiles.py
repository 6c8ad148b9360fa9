"""Tiles with rows and columns swapped, for checkpoints whose visual tokens run down the columns (`ps_version` v1).

Neither transformers nor vLLM has a switch for that order. A folder that needs it names this image processor, so that a
program without r1v_rl stops at loading rather than show its model transposed pictures.
"""

from typing import Any

from transformers import AutoImageProcessor, BatchFeature, GotOcr2ImageProcessor, PreTrainedConfig


class TransposedTilesImageProcessor(GotOcr2ImageProcessor):
    """`GotOcr2ImageProcessor` whose every tile, (3, height, width), comes out as (3, width, height)."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        features = super()._preprocess(*args, **kwargs)
        pixels = features["pixel_values"]
        is_list = isinstance(pixels, list)
        features["pixel_values"] = [t.mT for t in pixels] if is_list else pixels.swapaxes(-1, -2)
        return features


class _TransposedTilesConfig(PreTrainedConfig):
    """The name under which transformers' factory knows the processor; no model has it."""

    model_type = "r1v_rl_transposed_tiles"


AutoImageProcessor.register(
    _TransposedTilesConfig, image_processor_classes={"torchvision": TransposedTilesImageProcessor}, exist_ok=True
)
