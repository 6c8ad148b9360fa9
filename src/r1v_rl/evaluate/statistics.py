"""pass@1 over k samples, unbiased pass@n, majority vote, bootstrap intervals, and paired tests of two runs."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from r1v_rl.evaluate.interval import Accuracy, wilson

NUM_RESAMPLES = 10_000
_BLOCK = 2_000_000


def pass_at(num_samples: int, num_right: int, n: int) -> float:
    """Chance that of n of the samples, drawn without putting back, at least one is right (arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: If n is above the number of samples.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"pass@{n} needs at least {n} samples, there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, n) / math.comb(num_samples, n)


def majority(votes: Sequence[Hashable | None]) -> int | None:
    """Index of the first sample of the largest group of equal votes; None where nobody voted.

    Of groups of one size that which came first wins. A None is no vote.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, vote in enumerate(votes):
        if vote is not None:
            groups[vote].append(index)
    return max(groups.values(), key=len)[0] if groups else None


def bootstrap(scores: Sequence[float], *, seed: int = 0) -> Accuracy:
    """Mean score of the problems with the 95 % percentile interval over resampled problems.

    Where every problem has the same score no resample differs: the interval is Wilson's then.

    Raises:
        ValueError: If there are no problems.
    """
    values = np.asarray(scores, dtype=float)
    if not len(values):
        raise ValueError("an accuracy needs at least one problem")
    if np.ptp(values) == 0:
        return wilson(float(values[0]) * len(values), len(values))
    low, high = np.quantile(_resampled_means(values, seed), (0.025, 0.975))
    return Accuracy(float(values.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two runs on the same problems."""

    num_problems: int
    difference: Accuracy
    """Mean score of the first minus that of the second, with its bootstrap interval."""
    only_first: int
    """Problems with a higher score in the first run."""
    only_second: int
    p_value: float
    """Two-sided: exact McNemar where every score is 0 or 1, else a sign-flip permutation test."""
    test: str


def paired_test(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedTest:
    """Whether two runs differ, problem by problem.

    Raises:
        ValueError: If they have not the same number of problems, or none.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not len(differences):
        raise ValueError("a paired test needs at least one problem")
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    binary = all(score in (0.0, 1.0) for score in (*first, *second))
    p_value = mcnemar(above, below) if binary else _sign_flips(differences, seed)
    low, high = np.quantile(_resampled_means(differences, seed), (0.025, 0.975))
    interval = Accuracy(float(differences.mean()), float(low), float(high))
    name = "exact McNemar" if binary else "sign-flip permutation"
    return PairedTest(len(differences), interval, above, below, p_value, name)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: how likely a split of the differing problems at least this uneven is for a fair coin."""
    total = only_first + only_second
    tail = sum(math.comb(total, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def _sign_flips(differences: np.ndarray, seed: int) -> float:
    """Share of sign assignments, drawn at random, whose mean is as far from 0; the observed one counts as drawn."""
    rng, extreme, drawn = np.random.default_rng(seed), 0, 0
    observed = abs(differences.sum()) - 1e-12
    while drawn < NUM_RESAMPLES:
        count = min(NUM_RESAMPLES - drawn, max(1, _BLOCK // len(differences)))
        signs = rng.integers(0, 2, (count, len(differences))) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
        drawn += count
    return (extreme + 1) / (NUM_RESAMPLES + 1)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < NUM_RESAMPLES:
        count = min(NUM_RESAMPLES - len(means), max(1, _BLOCK // len(values)))
        means.extend(values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1))
    return np.asarray(means)
