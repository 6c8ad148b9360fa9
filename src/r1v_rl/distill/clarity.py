"""How well a picture can be read, measured on its pixels: sharpness, contrast, resolution, what tiling leaves of it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

HALF_SHARP = 100.0
"""Variance of the Laplacian (grey levels 0 to 255) at which sharpness is a half: below it a photograph customarily
counts as blurred (measure: Pech-Pacheco et al. 2000)."""
FULL_CONTRAST = 64.0
"""Standard deviation of the grey levels from which on contrast is 1: a quarter of the range."""


@dataclass(frozen=True, slots=True)
class Clarity:
    """The measurements of one picture, each in [0, 1], and their geometric mean."""

    sharpness: float
    contrast: float
    resolution: float
    """Shorter side over the side of a tile."""
    detail: float
    """Pixels that the model is shown over pixels that there are; 1 where nothing is scaled down."""
    num_tiles: int

    @property
    def score(self) -> float:
        """Geometric mean: a picture that fails one of them is not clear."""
        return math.prod((self.sharpness, self.contrast, self.resolution, self.detail)) ** 0.25

    @property
    def reason(self) -> str:
        """The measurements in words."""
        return ", ".join(f"{name} {value:.3g}" for name, value in asdict(self).items())


def clarity(image: Image.Image, *, num_tiles: int, tile_side: int) -> Clarity:
    """The measurements of an RGB picture.

    Args:
        num_tiles: Tiles that the model's processor cuts it into, a thumbnail included.
        tile_side: Pixels of a tile's side.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    blur = float(_laplacian(grey).var()) if min(grey.shape) > 2 else 0.0
    cut = max(1, num_tiles - 1)  # more than one tile comes with a thumbnail, which adds no detail
    shown = cut * tile_side**2 / (image.width * image.height)
    return Clarity(
        sharpness=blur / (blur + HALF_SHARP),
        contrast=min(1.0, float(grey.std()) / FULL_CONTRAST),
        resolution=min(1.0, min(image.size) / tile_side),
        detail=min(1.0, shown),
        num_tiles=num_tiles,
    )


def tile_side(processor_size: Mapping[str, int]) -> int:
    """Pixels of a tile's side, from the `size` of an image processor."""
    return int(processor_size.get("height") or processor_size.get("shortest_edge") or 448)


def _laplacian(grey: np.ndarray) -> np.ndarray:
    """Second differences, right, left, below and above; one pixel less on every side."""
    inner = grey[1:-1, 1:-1]
    return grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
