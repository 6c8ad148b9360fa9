"""What rewards that judge each completion by itself say of groups: asked for while the engine samples the others."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1v_rl.scoring.loader import RewardFunction
from r1v_rl.types import Example, RolloutGroup


@dataclass(slots=True)
class Said:
    """What one function said of P groups of G completions."""

    rewards: list[float | None]
    """P * G values."""
    extra: dict[str, list] = field(default_factory=dict)
    """Columns that it logged, P * G values each."""
    scalars: dict[str, list[float]] = field(default_factory=dict)
    """Metrics that it logged: all values of one call; of several calls their mean, a call counting by its completions.
    """


class EarlyVerdicts:
    """The verdicts on one generation, begun group by group.

    Each function has a thread while there is something for it to judge, which takes all groups that wait in one call.
    How they are shared out among the calls depends on timing; what is said of a completion must not.

    Args:
        functions: Those with `per_completion`.
        examples: The rows of all groups: every call has the columns of all of them.
    """

    def __init__(self, functions: Sequence[RewardFunction], examples: Sequence[Example], trainer_state: Any):
        columns = column_names(examples)
        self._queues = {function.name: _Queue(function, columns, trainer_state) for function in functions}
        self._begun: set[int] = set()

    def add(self, number: int, group: RolloutGroup) -> None:
        """Begin with a group, by its number in the generation. Any thread may call it, one at a time."""
        self._begun.add(number)
        for queue in self._queues.values():
            queue.add(number, group)

    def add_rest(self, groups: Sequence[RolloutGroup]) -> None:
        """Begin with those of all groups that were not added."""
        for number, group in enumerate(groups):
            if number not in self._begun:
                self.add(number, group)

    @property
    def seconds(self) -> float:
        """That the functions have worked so far, together."""
        return sum(queue.seconds for queue in self._queues.values())

    def of(self, function: RewardFunction) -> Said:
        """All that a function says, waited for; every group must have been added.

        Raises:
            RewardError: What the function met.
        """
        return self._queues[function.name].result(len(self._begun))

    def close(self) -> None:
        """Drop what waits: a thread ends with the call that it is in."""
        for queue in self._queues.values():
            queue.drop()


class _Queue:
    """The groups of one function, and the thread that hands them over."""

    def __init__(self, function: RewardFunction, columns: list[str], trainer_state: Any):
        self._function, self._columns, self._trainer_state = function, columns, trainer_state
        self._changed = threading.Condition()
        self._waiting: dict[int, RolloutGroup] = {}
        self._calls: list[tuple[list[int], Said]] = []
        """The numbers of each call's groups, and what was said of them."""
        self._error: BaseException | None = None
        self._runs = False
        self._worked_s = 0.0
        self._since: float | None = None

    def add(self, number: int, group: RolloutGroup) -> None:
        with self._changed:
            if self._error is not None:  # it ends the run when the rewards are asked for
                return
            self._waiting[number] = group
            if self._runs:
                return
            self._runs = True
        threading.Thread(target=self._run, name=f"reward {self._function.name}", daemon=True).start()

    def drop(self) -> None:
        with self._changed:
            self._waiting.clear()

    @property
    def seconds(self) -> float:
        with self._changed:
            return self._worked_s + (0.0 if self._since is None else time.perf_counter() - self._since)

    def result(self, num_groups: int) -> Said:
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)
        if self._error is not None:
            raise self._error
        return _in_order(self._calls, num_groups)

    def _run(self) -> None:
        while groups := self._next():
            try:
                with self._function.turn:
                    said = said_of(self._function, list(groups.values()), self._columns, self._trainer_state)
                self._calls.append((list(groups), said))
            except BaseException as error:  # another thread's to raise
                with self._changed:
                    self._error = error
                    self._waiting.clear()

    def _next(self) -> dict[int, RolloutGroup]:
        with self._changed:
            if self._since is not None:
                self._worked_s += time.perf_counter() - self._since
            groups = dict(sorted(self._waiting.items()))
            self._waiting.clear()
            self._since = time.perf_counter() if groups else None
            if not groups:
                self._runs = False
                self._changed.notify_all()
            return groups


def column_names(examples: Sequence[Example]) -> list[str]:
    """Of the columns that any of these rows has, as rewards are handed them."""
    return list(dict.fromkeys(name for example in examples for name in example.columns if name != "completion"))


def reward_arguments(groups: Sequence[RolloutGroup], columns: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a reward function in TRL's signature: one list of P * G values for each name, None where a
    row lacks the column."""
    pairs = [(group.example, completion) for group in groups for completion in group.completions]
    return {
        **{name: [example.columns.get(name) for example, _ in pairs] for name in columns},
        "id": [example.id for example, _ in pairs],
        "answer": [example.answer for example, _ in pairs],
        "prompts": [example.messages for example, _ in pairs],
        "completions": [[{"role": "assistant", "content": completion.text}] for _, completion in pairs],
        "completion_ids": [completion.token_ids for _, completion in pairs],
        "images": [example.images for example, _ in pairs],
    }


def said_of(
    function: RewardFunction, groups: Sequence[RolloutGroup], columns: Sequence[str], trainer_state: Any
) -> Said:
    """One call of a function."""
    extra: dict[str, list] = defaultdict(list)
    scalars: dict[str, list[float]] = defaultdict(list)
    rewards = function(
        **reward_arguments(groups, columns),
        trainer_state=trainer_state,
        log_extra=lambda column, values: extra[column].extend(values),
        log_metric=lambda name, value: scalars[name].append(float(value)),
    )
    return Said(rewards, extra, scalars)


def _in_order(calls: Sequence[tuple[list[int], Said]], num_groups: int) -> Said:
    """What one call with all groups would have said."""
    if len(calls) == 1:
        return calls[0][1]
    total = sum(len(said.rewards) for _, said in calls)
    size = total // num_groups

    def placed(of_each_call: Sequence[list]) -> list:
        whole: list = [None] * total
        for (numbers, _), values in zip(calls, of_each_call, strict=True):
            for i, number in enumerate(numbers):
                theirs = values[i * size : (i + 1) * size]
                whole[number * size : (number + 1) * size] = [*theirs, *[None] * (size - len(theirs))]
        return whole

    metrics: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for _, said in calls:
        for name, values in said.scalars.items():
            metrics[name].append((sum(values) / len(values), len(said.rewards)))
    columns = dict.fromkeys(column for _, said in calls for column in said.extra)
    return Said(
        rewards=placed([said.rewards for _, said in calls]),
        extra={column: placed([said.extra.get(column, []) for _, said in calls]) for column in columns},
        scalars={name: [sum(v * n for v, n in found) / sum(n for _, n in found)] for name, found in metrics.items()},
    )
