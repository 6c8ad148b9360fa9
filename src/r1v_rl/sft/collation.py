"""Rows of samples -> what the model takes, as one packed sequence or as padded rows, and where the loss is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from r1v_rl.models.packing import PackedLayout
from r1v_rl.sft.rows import TargetRows


class RowDataset(Dataset):
    """Item r is the list of samples that share row r."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[index]


class Collator:
    """Turns rows of samples into a batch.

    Args:
        rows: The samples.
        flat: One sequence (1, T) of all samples, which do not see each other, positions from 0 in each; else rows
            (B, T) of one sample each, right-padded.
        loss_weighting: `token` or `sqrt_length`.
        with_pixels: Read the pictures here; else only name them (`images`), for a cache to fill in what it has not.
    """

    def __init__(
        self,
        rows: TargetRows,
        *,
        flat: bool,
        pad_token_id: int,
        loss_weighting: str = "token",
        with_pixels: bool = True,
    ):
        self._rows, self._flat, self._pad = rows, flat, pad_token_id
        self._loss_weighting, self._with_pixels = loss_weighting, with_pixels

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Keys: `input_ids`; `layout` (flat) or `attention_mask` (padded); `positions`, the flattened index of the
        token before each target, `targets` and their `weights`, all (M,); `num_samples`, `num_tokens`; and, with
        pictures, `images` (each once), `image_rows` (for each tile slot the row of `pixel_values`) and `pixel_values`.
        """
        samples = [sample for row in rows for sample in row]
        encoded = [self._rows.ids(sample) for sample in samples]
        if self._flat:
            batch, starts = _flat_batch([ids for ids, _ in encoded])
        else:
            batch, starts = _padded_batch([ids for ids, _ in encoded], self._pad)
        positions, targets, weights = [], [], []
        for (ids, num_prompt), start in zip(encoded, starts, strict=True):
            count = len(ids) - num_prompt
            positions.append(torch.arange(start + num_prompt - 1, start + len(ids) - 1))
            targets.append(torch.tensor(ids[num_prompt:]))
            weights.append(torch.full((count,), 1.0 if self._loss_weighting == "token" else count**-0.5))
        batch |= {"positions": torch.cat(positions), "targets": torch.cat(targets), "weights": torch.cat(weights)}
        num_tokens = sum(len(ids) for ids, _ in encoded)
        return batch | {"num_samples": len(samples), "num_tokens": num_tokens} | self._vision(samples)

    def _vision(self, samples: list[int]) -> dict[str, Any]:
        """The batch's pictures, each once, and the tile that fills each slot (None: one to one)."""
        slots = [image for sample in samples for image in self._rows.images[sample]]
        images = list(dict.fromkeys(slots))
        if not images:
            return {}
        rows = None
        if len(images) != len(slots):
            first, offset = {}, 0
            for image in images:
                first[image] = offset
                offset += self._rows.num_tiles(image)
            rows = torch.tensor([first[i] + tile for i in slots for tile in range(self._rows.num_tiles(i))])
        batch: dict[str, Any] = {"images": images, "image_rows": rows}
        return batch | self._rows.vision_inputs(images) if self._with_pixels else batch


def _flat_batch(rows: list[list[int]]) -> tuple[dict[str, Any], list[int]]:
    """All rows one after the other, and where each starts."""
    layout = PackedLayout.of([len(ids) for ids in rows])
    ids = torch.tensor([token for row in rows for token in row])[None]
    return {"input_ids": ids, "layout": layout}, [segment.start for segment in layout.segments]


def _padded_batch(rows: list[list[int]], pad_token_id: int) -> tuple[dict[str, Any], list[int]]:
    """Right-padded rows, and where each starts in the flattened batch."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}, [i * width for i in range(len(rows))]
