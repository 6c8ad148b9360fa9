"""Long answers do not hold up a generation: more groups are asked for than it takes, the first whole ones are taken.

Of the others nothing is kept (`over_provision`), or they are continued in the next generations, with their weights
(`partial_rollouts`).
"""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.ahead import packed, unpacked
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion


@dataclass(slots=True)
class Asked:
    """A prompt of this process, and what there is of its group."""

    row: int
    """Of the dataset."""
    prompt: EncodedPrompt
    completions: list[Completion] = field(default_factory=list)
    """All of them, some partial; none, where no server has begun."""
    carried: int = 0
    """Generations that did not take it."""

    @property
    def is_whole(self) -> bool:
        return bool(self.completions) and not any(c.is_partial for c in self.completions)

    @property
    def num_tokens(self) -> int:
        """Of its completions."""
        return sum(len(c.token_ids) for c in self.completions)


class Tail:
    """What this process asks of a generation, and takes of it.

    Args:
        needed: P, groups that a generation takes.
        over_provision: Groups to ask for beyond them, as a share of P.
        partial_rollouts: Generations that a group may be carried over; 0 throws away what is not taken.
    """

    def __init__(self, needed: int, over_provision: float, partial_rollouts: int):
        self._needed, self._more = needed, math.ceil(over_provision * needed)
        self._most_carried = partial_rollouts
        self._left: list[Asked] = []

    def check(self, sampler: PromptSampler, world: int) -> None:
        """Raises RecipeError where the dataset has not as many rows as a generation asks for."""
        if sampler.num_examples < (self._needed + self._more) * world:
            raise RecipeError(
                f"`over_provision` asks for {(self._needed + self._more) * world} prompts a generation, the dataset "
                f"has {sampler.num_examples} rows: lower it"
            )

    def fresh_rows(self, rows: Sequence[int], spare: Sequence[int]) -> list[int]:
        """Rows to ask beside what is left of earlier generations: this one's, and spare ones where little is left."""
        left = {asked.row for asked in self._left}
        return [*rows, *[row for row in spare if row not in left][: max(0, self._more - len(self._left))]]

    def ask(self, rows: Sequence[int], prompts: Sequence[EncodedPrompt]) -> list[Asked]:
        """Everything to be asked, what is left of earlier generations first."""
        return [*self._left, *map(Asked, rows, prompts)]

    def enough(self, asked: Sequence[Asked]) -> Callable[[Set[int]], bool]:
        """Whether, given the places of the whole groups, there are as many as needed, and those that may not be carried
        any further are among them."""
        due = {place for place, one in enumerate(asked) if self._is_due(one)}
        return lambda whole: len(whole) >= self._needed and due <= whole

    def take(self, asked: Sequence[Asked], *, is_last: bool) -> tuple[list[Asked], dict[str, float]]:
        """The groups of the generation, in the order in which they were asked, and metrics by their logged names. What
        is not taken is left for the next one, or thrown away.

        Args:
            is_last: No generation follows.
        """
        whole = sorted((one for one in asked if one.is_whole), key=lambda one: not self._is_due(one))
        taken = {id(one) for one in whole[: self._needed]}
        assert len(taken) == self._needed
        kept, rest = [[one for one in asked if (id(one) in taken) == t] for t in (True, False)]
        dropped, self._left = (rest, []) if is_last or not self._most_carried else ([], rest)
        for one in self._left:
            one.carried += 1
        thrown, used = (sum(one.num_tokens for one in some) for some in (dropped, kept))
        return kept, {
            "rollout/dropped": len(dropped) / len(asked),
            "rollout/dropped_tokens": thrown,
            "rollout/dropped_tokens_frac": thrown / max(thrown + used, 1),
            "rollout/carried": len(self._left) / len(asked),
            "rollout/resumed": sum(one.carried > 0 for one in kept) / len(kept),
        }

    def _is_due(self, asked: Asked) -> bool:
        return bool(asked.carried) and asked.carried >= self._most_carried

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What is left of earlier generations."""
        left = self._left
        groups = packed([one.completions for one in left])
        return {"rows": [one.row for one in left], "carried": [one.carried for one in left], **groups}

    def restore(self, state: dict[str, Any], encode: Callable[[list[int]], list[EncodedPrompt]]) -> None:
        """Put back what `state` gave; `encode` gives the prompts of rows."""
        rows = state["rows"]
        self._left = list(map(Asked, rows, encode(rows), unpacked(state), state["carried"]))


def shared_tail(states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """Of the `state` of several processes, that of one of `world`: whole groups, dealt out in turn."""
    mine = slice(rank, None, world)
    groups = [group for state in states for group in unpacked(state)]
    lists = {name: [value for state in states for value in state[name]][mine] for name in ("rows", "carried")}
    return {**lists, **packed(groups[mine])}
