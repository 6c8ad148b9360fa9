"""How long a chain may get: scores -> repetition penalty (Skywork R1V, equation 1) or token budget. Pure functions.

Source: arXiv 2504.05599, section 2.3 (DRLC). The values of alpha, beta and gamma were never published.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_PENALTY = 2.0
CONSTANT = 1.0
"""What a score scales to where all rows have the same: no row stands out, so none is made shorter."""
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Scores:
    """The three scores of one row, on any scale; None where a row has none (a text-only row has no vision score)."""

    vision: float | None
    text: float | None
    integration: float | None


def min_max(values: Sequence[float | None]) -> list[float | None]:
    """Each value as (value - min) / (max - min) over the set; None stays None, equal values become `CONSTANT`."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high == low:
        return [None if value is None else CONSTANT for value in values]
    return [None if value is None else (value - low) / (high - low) for value in values]


def scaled_scores(rows: Sequence[Scores]) -> list[Scores]:
    """The rows' scores, each of the three min-max scaled over the set."""
    columns = (min_max([getattr(row, name) for row in rows]) for name in ("vision", "text", "integration"))
    return [Scores(*values) for values in zip(*columns, strict=True)]


def weighted_score(scaled: Scores, *, beta: float, gamma: float) -> float | None:
    """(v + beta t + gamma i) / (1 + beta + gamma), in [0, 1]; a score that is None is left out of sum and weights.

    None where nothing is left.
    """
    parts = ((scaled.vision, 1.0), (scaled.text, beta), (scaled.integration, gamma))
    known = [(value, weight) for value, weight in parts if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


def repetition_penalty(score: float | None, *, alpha: float) -> float:
    """P = min(2, exp(alpha (1 - score))): 1 for a score of 1, or where there is none."""
    if score is None:
        return 1.0
    return round(min(MAX_PENALTY, math.exp(alpha * (1.0 - score))), _DIGITS)


def token_budget(score: float | None, limits: tuple[int, int]) -> int:
    """Most tokens of a chain: from the lower limit at a score of 0 to the upper one at 1, or where there is none."""
    low, high = limits
    return high if score is None else round(low + (high - low) * score)
