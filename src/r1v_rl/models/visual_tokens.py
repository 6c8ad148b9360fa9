"""What a processor makes of a picture: how many tiles, and which token ids stand for it; asked once a size."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from r1v_rl.models.families import num_units, vision_inputs


class VisualTokens:
    """A vision-language processor taken apart, so that text and pictures can be processed each in its own time.

    Token ids and tiles of a picture depend on its size alone.
    """

    def __init__(self, processor: Any):
        self._processor = processor
        (self._placeholder,) = processor.tokenizer(processor.image_token, add_special_tokens=False)["input_ids"]
        self._known: dict[tuple[int, int], tuple[list[int], int]] = {}

    def ids(self, size: tuple[int, int]) -> list[int]:
        """The token ids that one placeholder becomes for a picture of (width, height)."""
        return self._of(size)[0]

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles that a picture of (width, height) becomes; 1 where the model takes pictures whole."""
        return self._of(size)[1]

    def expand(self, ids: list[int], runs: Sequence[list[int]]) -> list[int]:
        """`ids` with its placeholders, in order, replaced by `runs`."""
        expanded: list[int] = []
        rest = iter(runs)
        for token in ids:
            if token == self._placeholder:
                expanded += next(rest)
            else:
                expanded.append(token)
        return expanded

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model takes of all the pictures, in order, as the processor makes it (`VISION_INPUTS`)."""
        # the whole processor's defaults go before the image processor's settings: InternVL's cuts whatever those say
        defaults = self._processor.valid_processor_kwargs._defaults.get("images_kwargs", {})
        return vision_inputs(self._processor.image_processor(images=[list(pictures)], return_tensors="pt", **defaults))

    def _of(self, size: tuple[int, int]) -> tuple[list[int], int]:
        if size not in self._known:
            inputs = self._processor(
                text=[self._processor.image_token], images=[Image.new("RGB", size)], add_special_tokens=False
            )
            self._known[size] = list(inputs["input_ids"][0]), num_units(inputs)
        return self._known[size]
