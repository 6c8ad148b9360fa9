"""What can be told of a picture from its pixels alone: its colours by name and, of a drawing, the flat shapes in it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

SMALLEST = 0.001
"""Share of the picture from which on a colour or a shape is there: a square of a thirtieth of its sides."""
MIN_FLAT = 0.9
"""Share of a picture that lies in flat regions from which on it is a drawing; of a photograph shapes are not told."""
MIN_CHROMA = 20
"""Distance of a pixel's largest channel from its smallest (of 255) from which on it has a hue."""
_SIDE = 512
"""Pixels of the longer side that is looked at; larger pictures are scaled down."""
_SAME = 8
"""Difference (of 255) up to which neighbouring pixels belong together."""
_BLACK, _WHITE = 60, 240
_HUES = {"orange": (15, 42), "yellow": (42, 70), "green": (70, 165), "blue": (165, 250), "purple": (250, 345)}
"""Degrees; red is the rest."""
COLORS = ("red", *_HUES, "pink", "brown", "black", "white", "grey")
_SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "heptagon": 7, "octagon": 8}
FULLNESS = {name: n / math.tau * math.sin(math.tau / n) for name, n in _SIDES.items()} | {"circle": 1.0}
"""Share of its circumscribed circle that a regular shape fills: the same however it is turned."""
_LEAST_FULL, _LEAST_SOLID = 0.35, 0.6
"""Shares of that circle, and of its own hull, of which a region that fills less is a line, a frame or a letter."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A flat region that is no ground and no line, and the names that may be said of it: small ones have several."""

    names: frozenset[str]
    colors: frozenset[str]
    area: float
    """Share of the picture within its convex hull."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of one picture."""

    is_blank: bool
    colors: Mapping[str, float]
    """Share of the pixels that each name may be said of; a pixel may have two (pink is a red)."""
    shapes: tuple[Shape, ...] | None
    """None where the picture is no drawing."""
    has_more: bool = False
    """Whether a drawing holds lines, frames or letters beside its shapes."""


def look(image: Image.Image) -> Sight:
    """What is seen of an RGB picture."""
    if max(image.size) > _SIDE:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.NEAREST)  # no colours that were not there
    pixels = np.asarray(image, dtype=np.int16)
    named = _named(image)
    labels = _regions(pixels)
    areas = np.bincount(labels.ravel())
    large = np.flatnonzero(areas >= SMALLEST * labels.size)
    flat = areas[large].sum() / labels.size
    colors = {name: share for name, mask in named.items() if (share := float(mask.mean())) >= SMALLEST}
    if flat < MIN_FLAT:
        return Sight(_is_blank(pixels), colors, None)
    masks = [labels == label for label in large]
    grounds = [np.median(pixels[mask], axis=0) for mask in masks if _is_ground(mask)]
    shapes: list[Shape] = []
    has_more = False
    for mask in masks:
        if _is_ground(mask):
            continue
        if shape := _shape(mask, named):
            shapes.append(shape)
        elif not any(np.abs(np.median(pixels[mask], axis=0) - ground).max() <= _SAME for ground in grounds):
            has_more = True  # no corner that is cut off from the ground
    return Sight(_is_blank(pixels), colors, tuple(shapes), has_more)


def _is_blank(pixels: np.ndarray) -> bool:
    """Whether next to nothing differs from the middle colour."""
    differs = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=2) > _SAME
    return bool(differs.mean() < SMALLEST)


def _named(image: Image.Image) -> dict[str, np.ndarray]:
    """Name of a colour -> which pixels it may be said of."""
    pixels = np.asarray(image, dtype=np.int16)
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    hue = np.asarray(image.convert("HSV"), dtype=np.float32)[..., 0] * (360 / 255)
    colored = high - low >= MIN_CHROMA
    named = {name: colored & (hue >= start) & (hue < end) for name, (start, end) in _HUES.items()}
    named["red"] = colored & ((hue < 15) | (hue >= 345))
    named["pink"] = colored & ((hue < 15) | (hue >= 300)) & (high >= 190) & (low >= 90)
    named["brown"] = colored & (hue >= 5) & (hue < 45) & (high < 180)
    named["orange"] &= high >= 150
    named["black"] = ~colored & (high <= _BLACK)
    named["white"] = ~colored & (low >= _WHITE)
    named["grey"] = ~colored & (high > _BLACK) & (low < _WHITE)
    return named


def _is_ground(mask: np.ndarray) -> bool:
    """Whether the region reaches from edge to edge."""
    return bool(mask.any(axis=1).all() or mask.any(axis=0).all())


def _shape(mask: np.ndarray, named: Mapping[str, np.ndarray]) -> Shape | None:
    """The region as a shape; None for a line, a frame or a letter."""
    middle = np.argwhere(mask).mean(axis=0)
    hull = _hull(mask)
    after = np.roll(hull, -1, axis=0)
    area = abs(int((hull[:, 0] * after[:, 1] - hull[:, 1] * after[:, 0]).sum())) / 2
    radius = max(1.0, float(np.hypot(*(hull - middle).T).max()))
    fullness = area / (math.pi * radius**2)
    if mask.sum() < _LEAST_SOLID * area or fullness < _LEAST_FULL:
        return None
    names = {min(FULLNESS, key=lambda name: abs(FULLNESS[name] - fullness))}
    if fullness >= (1 - 1 / radius) ** 2:  # a circle with its edge a pixel off
        names.add("circle")
    colors = frozenset(color for color, where in named.items() if where[mask].mean() > 0.5)
    return Shape(frozenset(names), colors, float(area / mask.size))


def _hull(mask: np.ndarray) -> np.ndarray:
    """[corners, 2] of the convex hull of a region's pixels (their middles), from the ends of its rows."""
    rows = np.flatnonzero(mask.any(axis=1))
    left, right = mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    down, up = np.stack([rows, left], axis=1), np.stack([rows, right], axis=1)[::-1]
    corners: list[list[int]] = []
    for ends in (down.tolist(), up.tolist()):
        chain: list[list[int]] = []
        for point in ends:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        corners += chain
    return np.array(corners)


def _turn(a: list[int], b: list[int], c: list[int]) -> int:
    """Above 0 where a, b, c turn left; (row, column) each."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _regions(pixels: np.ndarray) -> np.ndarray:
    """[height, width]: each pixel's region, numbered from 0, of [height, width, channels].

    Horizontal runs of like pixels, joined where a pixel is like the one below it.
    """
    starts = np.ones(pixels.shape[:2], dtype=bool)
    starts[:, 1:] = np.abs(np.diff(pixels, axis=1)).max(axis=2) > _SAME
    runs = np.cumsum(starts.ravel()).reshape(starts.shape) - 1
    joined = np.abs(np.diff(pixels, axis=0)).max(axis=2) <= _SAME
    count = int(runs[-1, -1]) + 1
    above, below = np.divmod(np.unique(runs[:-1][joined] * count + runs[1:][joined]), count)
    parent = np.arange(count)
    while True:
        one, other = parent[above], parent[below]
        if (one == other).all():
            return np.unique(parent, return_inverse=True)[1][runs]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while (parent[parent] != parent).any():
            parent = parent[parent]
