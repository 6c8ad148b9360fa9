"""The length controller against values worked by hand."""

import math

import pytest

from r1v_rl.distill.length import (
    Scores,
    min_max,
    repetition_penalty,
    scaled_scores,
    token_budget,
    weighted_score,
)

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("vision", "text", "integration", "alpha", "beta", "gamma", "expected"),
    [
        # (0.5 + 2 * 0.25 + 1 * 0.75) / 4 = 0.4375; exp(1 * 0.5625) = 1.755055
        (0.5, 0.25, 0.75, 1.0, 2.0, 1.0, 1.755055),
        # (0.2 + 0.4 + 0.9) / 3 = 0.5; exp(ln 2 * 0.5) = sqrt 2
        (0.2, 0.4, 0.9, LN2, 1.0, 1.0, 1.414214),
        # (1 + 0 + 0) / 2 = 0.5; exp(3 * 0.5) = 4.48, above the cap
        (1.0, 0.0, 0.0, 3.0, 0.5, 0.5, 2.0),
        # only the vision score counts: exp(0.4 * 0.75) = 1.349859
        (0.25, 1.0, 1.0, 0.4, 0.0, 0.0, 1.349859),
    ],
)
def test_worked_values(vision, text, integration, alpha, beta, gamma, expected):
    score = weighted_score(Scores(vision, text, integration), beta=beta, gamma=gamma)
    assert repetition_penalty(score, alpha=alpha) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, LN2, 1.0, 5.0])
def test_bounds(alpha):
    """All scores 1: no penalty; all 0: e^alpha, at most 2."""
    best = weighted_score(Scores(1.0, 1.0, 1.0), beta=1.0, gamma=1.0)
    worst = weighted_score(Scores(0.0, 0.0, 0.0), beta=1.0, gamma=1.0)
    assert repetition_penalty(best, alpha=alpha) == 1.0
    assert repetition_penalty(worst, alpha=alpha) == pytest.approx(min(2.0, math.exp(alpha)), abs=1e-6)


def test_the_penalty_falls_with_the_score_and_stays_within_its_range():
    penalties = [repetition_penalty(i / 100, alpha=1.3) for i in range(101)]
    assert penalties == sorted(penalties, reverse=True)
    assert penalties[0] == 2.0 and penalties[-1] == 1.0


def test_scaling_over_the_set():
    assert min_max([2.0, None, 5.0, 3.5]) == [0.0, None, 1.0, 0.5]
    rows = [Scores(10.0, 1.0, None), Scores(30.0, 1.0, 0.2), Scores(None, 1.0, 0.6)]
    assert scaled_scores(rows) == [Scores(0.0, 1.0, None), Scores(1.0, 1.0, 0.0), Scores(None, 1.0, 1.0)]


@pytest.mark.parametrize("rows", [1, 5])
def test_constant_scores_and_one_row(rows):
    """No division by zero: nothing stands out, so nothing is penalised."""
    scaled = scaled_scores([Scores(0.4, 3.0, 0.0)] * rows)
    assert scaled == [Scores(1.0, 1.0, 1.0)] * rows
    assert repetition_penalty(weighted_score(scaled[0], beta=1.0, gamma=1.0), alpha=2.0) == 1.0
    assert min_max([]) == [] and min_max([None]) == [None]


def test_a_missing_score_is_left_out_not_zero():
    """(0.5 + 3 * 0.25) / 4 without the text score; a row without any score is not penalised."""
    assert weighted_score(Scores(0.5, None, 0.25), beta=7.0, gamma=3.0) == pytest.approx(0.3125)
    assert weighted_score(Scores(None, 0.6, None), beta=0.0, gamma=1.0) is None
    assert repetition_penalty(None, alpha=2.0) == 1.0
    assert token_budget(None, (10, 90)) == 90


def test_token_budget():
    assert [token_budget(score, (20, 100)) for score in (0.0, 0.25, 1.0)] == [20, 40, 100]
