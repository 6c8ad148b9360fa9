"""pass@n, majority, bootstrap and paired tests against values worked by hand and by counting everything."""

from itertools import combinations, product

import numpy as np
import pytest

from r1v_rl.evaluate.measures import majority_scores
from r1v_rl.evaluate.statistics import bootstrap, majority, mcnemar, paired_test, pass_at


def test_pass_at_n_is_the_share_of_all_draws():
    for samples, right in product(range(1, 8), range(8)):
        if right > samples:
            continue
        marks = [True] * right + [False] * (samples - right)
        for n in range(1, samples + 1):
            draws = list(combinations(marks, n))
            assert pass_at(samples, right, n) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at(5, 2, 1) == pytest.approx(0.4) and pass_at(5, 2, 2) == pytest.approx(0.7)  # 1 - C(3,2)/C(5,2)
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at(2, 1, 3)


def test_majority_votes():
    assert majority(["a", "b", "b"]) == 1
    assert majority(["a", "b", "b", "a"]) == 0  # a tie: which came first
    assert majority([None, None, "c"]) == 2 and majority([None, None]) is None


def test_majority_counts_right_samples_as_one_answer():
    def rows(row_id, *pairs):
        return [{"id": row_id, "answer": answer, "correct": right} for answer, right in pairs]

    answers = [
        *rows("1", ("7", False), ("0.5", True), ("1/2", True)),
        *rows("2", ("4", True), ("3", False), ("$3$", False)),
        *rows("3", (None, False), (None, None), ("9", True)),
        *rows("4", (None, False), (None, False), (None, False)),
    ]
    assert majority_scores(answers) == [1.0, 0.0, 1.0, 0.0]


def test_bootstrap_against_every_resample():
    """Four problems: all 4^4 resamples counted."""
    scores = [1.0, 0.0, 0.4, 0.8]
    means = np.array([sum(draw) / 4 for draw in product(scores, repeat=4)])
    low, high = np.quantile(means, (0.025, 0.975))
    found = bootstrap(scores)
    assert found.value == pytest.approx(0.55)
    assert found.low == pytest.approx(low, abs=0.051) and found.high == pytest.approx(high, abs=0.051)
    assert bootstrap(scores) == found != bootstrap([1.0, 0.0, 0.4, 0.9])


def test_bootstrap_of_many_problems_is_the_normal_interval():
    scores = [1.0] * 300 + [0.0] * 700
    found, half = bootstrap(scores), 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.low == pytest.approx(0.3 - half, abs=0.003) and found.high == pytest.approx(0.3 + half, abs=0.003)


def test_all_alike_is_not_certain():
    """No resample differs: Wilson's interval, 5 of 5 right is [0.566, 1]."""
    assert bootstrap([1.0] * 5).low == pytest.approx(0.566, abs=1e-3)
    assert bootstrap([0.0] * 5).high == pytest.approx(1 - 0.566, abs=1e-3)


def test_mcnemar_by_hand():
    assert mcnemar(0, 5) == pytest.approx(2 / 32) and mcnemar(3, 3) == 1.0 and mcnemar(0, 0) == 1.0
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 256)


def test_paired_test_of_zeros_and_ones():
    first = [1.0] * 6 + [0.0] * 2 + [1.0] * 12
    second = [0.0] * 6 + [1.0] * 2 + [1.0] * 12
    found = paired_test(first, second)
    assert (found.num_problems, found.only_first, found.only_second) == (20, 6, 2)
    assert found.difference.value == pytest.approx(0.2) and found.test == "exact McNemar"
    assert found.p_value == pytest.approx(2 * (1 + 8 + 28) / 256)


def test_sign_flips_against_every_assignment():
    first, second = [0.8, 0.6, 1.0, 0.2, 0.4, 0.9], [0.2, 0.4, 0.8, 0.4, 0.0, 0.1]
    differences = np.array(first) - np.array(second)
    flips = [abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12 for signs in product((1, -1), repeat=6)]
    found = paired_test(first, second)
    assert found.test == "sign-flip permutation" and found.p_value == pytest.approx(np.mean(flips), abs=0.01)
    assert paired_test(first, first).p_value == 1.0
