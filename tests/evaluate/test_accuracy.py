"""Accuracy and its interval, for one answer a row and for several."""

import math

import pytest

from r1v_rl.evaluate.accuracy import Answered, accuracy
from r1v_rl.evaluate.interval import wilson
from r1v_rl.scoring import Verdict
from r1v_rl.types import Completion, Example


def answered(*rows: str) -> list[Answered]:
    """One row a word, `1` for a right answer, `0` for a wrong one, `?` for one that nobody can judge."""
    completion = Completion([1], [0.0], "", False)
    values = {"1": True, "0": False, "?": None}
    return [
        Answered(Example(str(i), [], (), "1"), completion, Verdict(values[mark], None, "test"))
        for i, word in enumerate(rows)
        for mark in word
    ]


def test_the_interval_is_wilsons():
    """10 of 20: centre (0.5 + 1.9207 / 20) / (1 + 3.8415 / 20) = 0.5, half-width 0.2007 (Wilson 1927, by hand)."""
    found = wilson(10, 20)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.2993, 0.7007), abs=1e-4)
    assert wilson(0, 5).low == 0.0 and wilson(5, 5).high == 1.0


def test_one_answer_a_row_is_the_plain_interval():
    assert accuracy(answered("1", "0", "0", "?")) == wilson(1, 4)


def test_every_row_counts_alike():
    assert accuracy(answered("1111", "0")).value == 0.5


def test_answers_that_agree_tell_no_more_than_one():
    found, plain = accuracy(answered("1111", "0000", "1111", "0000")), wilson(2, 4)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_independent_answers_narrow_the_interval():
    """Rows of two answers each: shares 1, 1/2, 1/2, 0 have half the variance of single answers: 8 of them."""
    found, plain = accuracy(answered("11", "10", "01", "00")), wilson(4, 8)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    same = accuracy(answered("10", "01", "10", "01"))  # no variance at all is not infinitely many
    assert same.low == pytest.approx(wilson(2, 4).low) and not math.isnan(same.low)
