"""What a frozen vision tower sees in a prompt's pictures: computed once for all passes, kept over steps on demand."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from r1v_rl.models.families import projector_input, why_no_features
from r1v_rl.models.parts import part_module


class VisionFeatures:
    """Turns pixels into the features that the tower (`run_without_graph_where_frozen`) takes in their place.

    The features are those before the projector, so that it may train. Every prompt is a batch of its own: its features
    depend on its pictures alone, to the last bit, whether they come out of the cache or not.

    Args:
        model: A model for which `why_not` is None.
        cache_bytes: Main memory for features of earlier steps; those used last stay. 0 keeps none.
    """

    def __init__(self, model: Any, *, cache_bytes: int = 0):
        self._tower, self._config = part_module(model, "vision_encoder"), model.config
        self._limit = cache_bytes
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0
        self.tower_tiles = 0
        """Tiles that went through the tower since the start."""

    @staticmethod
    def why_not(model: Any) -> str | None:
        """Why the features of `model` cannot take the place of pixels, in words; None where they can."""
        if reason := why_no_features(model):
            return reason
        if any(parameter.requires_grad for parameter in part_module(model, "vision_encoder").parameters()):
            return "its vision encoder trains"
        return None

    @torch.no_grad()
    def of(
        self, pixels: Float[Tensor, "K 3 height width"], images: Sequence[Image.Image]
    ) -> Float[Tensor, "K tokens hidden"]:
        """Features of one prompt's K tiles, on the pixels' device.

        Args:
            pixels: The tiles.
            images: The pictures they were cut from, by which the cache knows them.
        """
        key = _digest(images) if self._limit else b""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].to(pixels.device)
        self.tower_tiles += len(pixels)
        features = self._encoded(pixels)
        if self._limit:
            self._keep(key, features)
        return features

    @torch.no_grad()
    def of_named(
        self,
        names: Sequence[Hashable],
        read: Callable[[list], Tensor],
        num_tiles: Callable[[Any], int],
        device: torch.device,
    ) -> Float[Tensor, "K tokens hidden"]:
        """Features of pictures that the caller has names for, all their tiles in order, on `device`.

        Every picture is a batch of its own. Nothing is dropped for them: in a run that comes round to every picture
        again, those seen first stay.

        Args:
            read: Names -> pixels of their tiles; called for those that are not kept.
            num_tiles: Name -> number of its tiles.
        """
        missing = [name for name in names if name not in self._kept]
        fresh: dict[Hashable, Tensor] = {}
        if missing:
            pixels = read(missing).to(device)
            self.tower_tiles += len(pixels)
            tiles = pixels.split([num_tiles(name) for name in missing])
            fresh = {n: self._encoded(t) for n, t in zip(missing, tiles, strict=True)}
        found = torch.cat([(fresh if name in fresh else self._kept)[name].to(device) for name in names])
        for name, part in fresh.items():
            size = part.numel() * part.element_size()
            if self._bytes + size <= self._limit:
                self._kept[name] = part.to("cpu")
                self._bytes += size
        return found

    def _encoded(self, pixels: Tensor) -> Tensor:
        dtype = next(self._tower.parameters()).dtype
        return projector_input(self._config, self._tower, pixels.to(dtype))

    def _keep(self, key: Hashable, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if size > self._limit:
            return
        self._kept[key] = features.to("cpu")
        self._bytes += size
        while self._bytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.numel() * oldest.element_size()


def _digest(images: Sequence[Image.Image]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.digest()
