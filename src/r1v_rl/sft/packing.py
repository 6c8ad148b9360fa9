"""Which samples share a row, and which rows a batch: a function of lengths, seed and epoch, for exact resume."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler

_OPEN_ROWS = 1024
"""Rows that wait for a sample to fill them; the fullest is closed when there are more."""


def pack(lengths: Sequence[int], order: Sequence[int], max_length: int) -> list[list[int]]:
    """Samples, taken in `order`, put whole into rows of at most `max_length` tokens, each where it fits best.

    Returns:
        For each row its samples.
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (tokens left, row) of the open rows, sorted
    for sample in order:
        length = lengths[sample]
        if length > max_length:
            raise ValueError(f"sample {sample} has {length} tokens, more than a row of {max_length}")
        place = bisect_left(space, (length, -1))
        if place < len(space):
            left, row = space.pop(place)
            rows[row].append(sample)
        else:
            left, row = max_length, len(rows)
            rows.append([sample])
        if left - length:
            insort(space, (left - length, row))
        if len(space) > _OPEN_ROWS:
            space.pop(0)
    return rows


class RowBatches(Sampler[list[int]]):
    """Batches of row numbers, for one process of several; every epoch in another order.

    Args:
        num_rows: Rows of an epoch.
        batch_size: Rows of a batch on one process.
        shuffle: Whether rows change places from epoch to epoch.
        drop_last: Leave out the rows that fill no batch on every process; else the first ones fill it up where there
            are several processes.
    """

    def __init__(
        self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool, rank: int, world: int
    ):
        self.num_rows, self.batch_size = num_rows, batch_size
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._rank, self._world = rank, world
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.num_rows, self.batch_size * self._world)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_rows))
        if self._shuffle:
            order = shuffled(self.num_rows, self._seed, self._epoch)
        share = self.batch_size * self._world
        if self._world > 1 and not self._drop_last:
            order = [*order, *(order[i % self.num_rows] for i in range(-self.num_rows % share))]
        for start in range(0, len(self) * share, share):
            first = start + self._rank * self.batch_size
            yield order[first : min(first + self.batch_size, start + share)]


class RowLoader(DataLoader):
    """A data loader whose batch sampler hears of a new epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def shuffled(count: int, seed: int, epoch: int = 0) -> list[int]:
    """A permutation of `range(count)`, another one for every seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
