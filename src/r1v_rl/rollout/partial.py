"""Groups some of whose completions are begun already: what is asked for them, and what has become of them."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from r1v_rl.types import Completion


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request: a whole group, or the rest of one completion."""

    group: int
    place: int | None = None
    """Of the completion in its group; None asks for all of them."""
    before: Completion | None = None
    """What there is of it."""

    @property
    def token_ids(self) -> list[int]:
        """To follow the prompt."""
        return self.before.token_ids if self.before is not None else []

    def parameters(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Sampling parameters of the rest, given those of a whole completion. A penalty for repetition sees prompt and
        completion alike, and so needs nothing."""
        if self.before is None:
            return whole
        done = len(self.before.token_ids)
        least = {"min_tokens": max(0, whole["min_tokens"] - done)} if "min_tokens" in whole else {}
        return {**whole, **least, "n": 1, "max_tokens": whole["max_tokens"] - done}

    def continued(self, token_ids: list[int], logprobs: list[float], step: int) -> tuple[list[int], list[float], int]:
        """All there is of a completion now, every token with the log-probability that it was sampled with, and the
        step of the oldest weights."""
        if self.before is None or not self.before.token_ids:
            return token_ids, logprobs, step
        assert self.before.weight_version is not None
        oldest = min(self.before.weight_version, step)
        return self.before.token_ids + token_ids, self.before.logprobs + logprobs, oldest


def wanted(begun: Sequence[Sequence[Completion]]) -> list[Wanted]:
    """What must be asked until groups are whole, of which there is nothing (an empty row) or something."""
    found = []
    for group, completions in enumerate(begun):
        if not completions:
            found.append(Wanted(group))
        found += [Wanted(group, place, c) for place, c in enumerate(completions) if c.is_partial]
    return found


def whole_groups(asked: Sequence[Wanted], answered: Set[int], num_groups: int) -> set[int]:
    """Those of which no request is open.

    Args:
        answered: Numbers of requests.
    """
    return set(range(num_groups)) - {one.group for number, one in enumerate(asked) if number not in answered}


def put_back(
    begun: Sequence[Sequence[Completion]], asked: Sequence[Wanted], answers: Sequence[list[Completion] | None]
) -> list[list[Completion]]:
    """The groups of `begun` with what was answered; what was not (None) stays as it was."""
    groups = [list(completions) for completions in begun]
    for one, completions in zip(asked, answers, strict=True):
        if completions is None:
            continue
        if one.place is None:
            groups[one.group] = completions
        else:
            (groups[one.group][one.place],) = completions
    return groups
