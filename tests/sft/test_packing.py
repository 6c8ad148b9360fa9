"""Which samples share a row and which rows a batch."""

import random

import pytest

from r1v_rl.sft.packing import RowBatches, pack, shuffled


def test_every_sample_stands_whole_in_one_row():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(3000)]
    rows = pack(lengths, shuffled(len(lengths), 3), 128)
    assert sorted(sample for row in rows for sample in row) == list(range(3000))
    fills = [sum(lengths[s] for s in row) for row in rows]
    assert max(fills) <= 128
    assert sum(fills) / (128 * len(rows)) > 0.98, "rows are nearly full"
    assert rows == pack(lengths, shuffled(len(lengths), 3), 128) != pack(lengths, shuffled(len(lengths), 4), 128)


def test_long_samples_do_not_stand_together():
    """Best fit in a random order, not longest first: a row is a sample of the data, not of one length."""
    lengths = [100] * 50 + [10] * 500
    rows = pack(lengths, shuffled(550, 0), 120)
    assert sum(1 for row in rows[: len(rows) // 2] for s in row if lengths[s] == 100) < 45


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens"):
        pack([3, 9], [0, 1], 8)


def batches(epoch=0, rank=0, world=1, drop_last=False, num_rows=11):
    sampler = RowBatches(num_rows, 2, shuffle=True, seed=5, drop_last=drop_last, rank=rank, world=world)
    sampler.set_epoch(epoch)
    taken = list(sampler)
    assert len(taken) == len(sampler)
    return taken


def test_an_epoch_holds_every_row_once_and_the_next_is_another_order():
    first, second = batches(0), batches(1)
    assert sorted(r for b in first for r in b) == sorted(r for b in second for r in b) == list(range(11))
    assert first != second and first == batches(0)


def test_processes_share_an_epoch():
    shares = [batches(rank=rank, world=2) for rank in range(2)]
    assert [len(b) for share in shares for b in share] == [2] * 6, "all processes take part in every batch"
    assert {r for share in shares for b in share for r in b} == set(range(11))
    dropped = [batches(rank=rank, world=2, drop_last=True) for rank in range(2)]
    rows = [r for share in dropped for b in share for r in b]
    assert len(rows) == len(set(rows)) == 8
