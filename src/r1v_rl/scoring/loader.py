"""Reward functions as the trainer calls them: found by name, given copies, their results checked."""

import asyncio
import copy
import inspect
import logging
import math
import numbers
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.isolation import PluginProcess
from r1v_rl.scoring.plugins import Source, check_name, compute_score_as_reward, is_compute_score, where
from r1v_rl.scoring.rules import BUILT_IN, RewardSettings
from r1v_rl.scoring.workers import DEFAULT_TIMEOUT_S

logger = logging.getLogger(__name__)

_HANDLES = ("trainer_state", "log_extra", "log_metric")
_ATOMS = (str, int, float, bool, bytes, type(None))


class RewardFunction:
    """A reward with a name, called with TRL's keywords; returns one float or None per completion.

    The function of a user gets copies, so that it cannot change what other rewards and the loss see. One that is named
    by file or dotted path runs in a process of its own, under a time limit; one that is handed over in Python runs in
    the trainer's. An exception, a death, a timeout, a wrong length or type, inf and NaN name the function and the row:
    they raise `RewardError`, or, with `skips_failures`, are logged and leave None for the rows they touch.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any] | PluginProcess,
        *,
        is_built_in: bool = False,
        source: Source | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        skips_failures: bool = False,
    ):
        self.name = name
        self.source = source
        """File and sha256 of a user's reward; None for a built-in one and for a function handed over in Python."""
        self.num_failures = 0
        """Completions left without a reward because the function failed."""
        self.per_completion = bool(getattr(function, "per_completion", False))
        """Whether it judges each completion by itself, as a function says of itself by an attribute of this name. Then
        it is asked while others are sampled, several times a generation, each time with some of the groups."""
        self.turn = threading.Lock()
        """Held by the threads that ask it so, one at a time."""
        self._function = function
        self._is_built_in = is_built_in
        self._timeout_s = timeout_s
        self._skips_failures = skips_failures

    @property
    def __name__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"RewardFunction({self.name!r})"

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        if not self._is_built_in:
            arguments.pop("images", None)  # to copy the pictures of every completion costs more than most rewards
        if self._is_built_in or not self._skips_failures:
            rewards, problems = self.judge(**arguments)
            if problems:
                raise RewardError(problems[0])
            return rewards
        try:
            rewards, problems = self.judge(**arguments)
            num_failed = len(problems)
        except RewardError as error:
            rewards, problems, num_failed = [None] * len(completions), [str(error)], len(completions)
        if problems:
            self.num_failures += num_failed
            logger.warning("%s; %d completions go without this reward (reward_failure: skip)", problems[0], num_failed)
        if columns.get("log_metric") is not None:
            columns["log_metric"](f"reward_workers/{self.name}_failed", num_failed / max(1, len(completions)))
        return rewards

    def judge(self, **arguments: Any) -> tuple[list[float | None], list[str]]:
        """The rewards, and for each that had to become None what is wrong with it.

        Raises:
            RewardError: If there are none.
        """
        completions = arguments["completions"]
        if isinstance(self._function, PluginProcess):
            return self._function.call(arguments, self._timeout_s * max(1, len(completions)))
        if not self._is_built_in:
            copied: dict[int, Any] = {}
            arguments = {key: value if key in _HANDLES else copy_of(value, copied) for key, value in arguments.items()}
        try:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                result = run_async(result)
        except RewardError as error:
            raise RewardError(f"reward function {self.name!r}: {error}") from error
        except (Exception, SystemExit) as error:
            path = "" if self.source is None else self.source.path
            raise RewardError(
                f"reward function {self.name!r} must return one float or None per completion; it raised "
                f"{where(error, path)} (called with {len(completions)} completions, the first of "
                f"{_row(arguments.get('id'), 0)})"
            ) from error
        return self._checked(result, len(completions), arguments.get("id"))

    def close(self) -> None:
        """End the process of the function, where it has one."""
        if isinstance(self._function, PluginProcess):
            self._function.close()

    def _checked(self, result: Any, num_rows: int, ids: Sequence[Any] | None) -> tuple[list[float | None], list[str]]:
        if hasattr(result, "tolist") and not isinstance(result, list | tuple):
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise RewardError(
                f"reward function {self.name!r} must return a list of {num_rows} floats or None; received "
                f"{type(result).__name__}"
            )
        if len(result) != num_rows:
            missing = f"; the first row without one is {_row(ids, len(result))}" if len(result) < num_rows else ""
            raise RewardError(
                f"reward function {self.name!r} must return one reward per completion, {num_rows}; received "
                f"{len(result)}{missing}"
            )
        rewards: list[float | None] = []
        problems = []
        for row, value in enumerate(result):
            try:
                rewards.append(self._checked_value(value, row, ids))
            except RewardError as error:
                rewards.append(None)
                problems.append(str(error))
        return rewards, problems

    def _checked_value(self, value: Any, row: int, ids: Sequence[Any] | None) -> float | None:
        if value is None:
            return None
        if hasattr(value, "item") and not isinstance(value, numbers.Real) and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"reward function {self.name!r} must return floats or None; received {type(value).__name__} "
                f"{value!r:.60} for {_row(ids, row)}"
            )
        reward = float(value)
        if not math.isfinite(reward):
            raise RewardError(
                f"reward function {self.name!r} must return finite rewards; received {reward} for {_row(ids, row)}: "
                "return None where a completion cannot be judged"
            )
        return reward


def load_rewards(
    names: Sequence[str | Callable[..., Any]], config: Any = None, *, prompt_opens_think: bool | None = None
) -> list[RewardFunction]:
    """One `RewardFunction` per entry of `reward_funcs`, in order.

    Args:
        names: `accuracy`, `format`, `module.function`, `path/file.py:function`, or a function.
        config: Anything with the fields of `RewardSettings` as attributes; a missing or None one has its default.
        prompt_opens_think: Whether the chat template opens `<think>`: `format.prompt_opens_think(rendered_prompt)`.

    Raises:
        RewardError: If one cannot be loaded, or two have one name.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise RewardError(f"reward_funcs must be a list, e.g. [accuracy, format]; received {names!r}")
    settings = _settings(config, prompt_opens_think)
    rewards = [_load(name, settings) for name in names]
    seen: set[str] = set()
    for reward in rewards:
        if reward.name in seen:
            raise RewardError(
                f"reward_funcs must have distinct names, which name the metrics; received {reward.name!r} twice"
            )
        seen.add(reward.name)
    return rewards


def copy_of(value: Any, copied: dict[int, Any]) -> Any:
    """A deep copy; what is shared in the value is shared in the copy. Lists of numbers and texts take no time.

    Args:
        copied: What is already copied, by id.
    """
    if id(value) not in copied:
        if type(value) is dict:
            copied[id(value)] = {key: copy_of(item, copied) for key, item in value.items()}
        elif type(value) in (list, tuple, set):
            copied[id(value)] = type(value)([item if type(item) in _ATOMS else copy_of(item, copied) for item in value])
        else:
            copied[id(value)] = copy.deepcopy(value)
    return copied[id(value)]


def _load(name: str | Callable[..., Any], settings: RewardSettings) -> RewardFunction:
    if isinstance(name, RewardFunction):
        return name
    limits: dict[str, Any] = {
        "timeout_s": settings.reward_timeout_s,
        "skips_failures": settings.reward_failure == "skip",
    }
    if isinstance(name, str):
        if name in BUILT_IN:
            return RewardFunction(name, BUILT_IN[name](settings), is_built_in=True)
        check_name(name)
        process = PluginProcess(name, settings.reward_env or ())
        logger.info("reward %s runs code of %s, sha256 %s", name, process.source.path, process.source.sha256)
        label = name.rpartition(":")[2].rpartition(".")[2]
        return RewardFunction(label, process, source=process.source, **limits)
    if hasattr(name, "forward"):
        raise RewardError(
            f"reward_funcs: a model itself cannot be handed over; received {type(name).__name__}: write `reward_model` "
            "there, and its folder under the key reward_model"
        )
    if not callable(name):
        raise RewardError(f"reward_funcs must hold names and functions; received {type(name).__name__} {name!r:.60}")
    label = getattr(name, "__name__", type(name).__name__)
    if is_compute_score(name):
        name = compute_score_as_reward(name, is_sequential=False)
    return RewardFunction(label, name, **limits)


def _settings(config: Any, prompt_opens_think: bool | None) -> RewardSettings:
    values = {field.name: getattr(config, field.name, None) for field in fields(RewardSettings)}
    if prompt_opens_think is not None:
        values["prompt_opens_think"] = prompt_opens_think
    return RewardSettings(**{key: value for key, value in values.items() if value is not None})


def _row(ids: Sequence[Any] | None, row: int) -> str:
    return f"position {row}" if ids is None or row >= len(ids) else f"row {ids[row]!r} (position {row})"


def run_async(awaitable: Any) -> Any:
    """The result of a coroutine, also where this thread already runs an event loop."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: asyncio.run(wait())).result()
