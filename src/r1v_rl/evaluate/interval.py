"""A share of right answers with its 95 % interval."""

import math
from dataclasses import dataclass

_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(right: float, total: float) -> Accuracy:
    """Share and Wilson score interval (95 %) of `right` out of `total`; it never leaves [0, 1].

    Raises:
        ValueError: If `total` is 0.
    """
    if total < 1:
        raise ValueError("an accuracy needs at least one row")
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half))
