"""Rollouts ahead of the trainer: the servers sample the next `max_staleness` generations while it updates.

At the start of every k-th generation the servers get the present weights, and the prompts of the k generations that
follow: generation n is sampled with weights that are `(n - 1) % k + 1` generations old, whatever the timing. Only the
waiting for replies is done in the background; weights and whatever else processes do together is not.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from r1v_rl.grpo.sampler import chosen
from r1v_rl.grpo.verdicts import EarlyVerdicts
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion

_CLOSE_S = 30.0
Asked = Coroutine[Any, Any, list[list[Completion]]]
Answer = tuple[list[list[Completion]], dict[str, float]]
"""Completions, and metrics by their logged names."""


@dataclass(slots=True)
class Ahead:
    """One generation of this process, sampled or being sampled."""

    prompts: list[EncodedPrompt]
    version: int
    """Optimizer steps behind the weights that sample it."""
    begun: int
    """The generation whose update these weights were to begin."""
    answer: "Future[Answer]"
    early: EarlyVerdicts | None = None
    """Verdicts that begin while it is sampled."""


class RolloutsAhead:
    """What is sampled and not yet trained on, by generation. Make one, and call it, in the main thread.

    Args:
        max_staleness: k, in generations.
    """

    def __init__(self, max_staleness: int):
        self._k = max_staleness
        self._begun: dict[int, Ahead] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def missing(self, generation: int, last: int) -> list[int]:
        """What must be begun at the start of this generation, so that the trainer need not wait later.

        Args:
            last: The run's last generation.
        """
        first = generation - generation % self._k
        wanted = range(generation, min(first + self._k, last) + 1)
        return [number for number in wanted if number not in self._begun]

    def begin(
        self,
        generation: int,
        prompts: list[EncodedPrompt],
        asked: Asked,
        *,
        version: int,
        begun: int,
        early: EarlyVerdicts | None = None,
    ) -> None:
        """Run `asked`, an engine's `generate_async`, after those begun before it.

        Args:
            version: Optimizer steps behind the weights that the engine holds.
            begun: The generation at whose start it got them.
        """
        if self._loop is None:
            self._loop, self._turn = asyncio.new_event_loop(), asyncio.Lock()
            self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts ahead", daemon=True)
            self._thread.start()
        answer = asyncio.run_coroutine_threadsafe(self._in_turn(asked), self._loop)
        self._begun[generation] = Ahead(prompts, version, begun, answer, early)

    def wait(self) -> None:
        """Until nothing is under way: weights may be handed over. What failed says so when it is taken."""
        wait([ahead.answer for ahead in self._begun.values()])

    def take(self, generation: int) -> Ahead:
        """This generation, sampled.

        Raises:
            UserError: What the engine met.
            RuntimeError: If it is staler than allowed: it would have been trained on.
        """
        ahead = self._begun.pop(generation)
        ahead.answer.result()
        if generation - ahead.begun > self._k:
            raise RuntimeError(
                f"generation {generation} was sampled with the weights of generation {ahead.begun}, which is more than "
                f"`max_staleness` ({self._k}) before it"
            )
        return ahead

    def close(self) -> None:
        """Forget everything; what the engine has in hand is given up, and the thread ends. May be called again."""
        given_up = [ahead.early for ahead in self._begun.values() if ahead.early is not None]
        self._begun.clear()
        if self._loop is None or self._thread is None:
            return
        wait([asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)], _CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        self._loop = self._thread = None
        for early in given_up:  # nothing adds to them any more
            early.close()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[int, dict[str, Any]]:
        """Every sampled generation by its number, waited for; one that failed is left out, and asked for again."""
        self.wait()
        done = {n: ahead for n, ahead in self._begun.items() if ahead.answer.exception() is None}
        return {n: {"version": a.version, "begun": a.begun, **packed(a.answer.result()[0])} for n, a in done.items()}

    def restore(self, generation: int, prompts: list[EncodedPrompt], state: dict[str, Any]) -> None:
        """Put back a generation of `state`."""
        answer: Future = Future()
        answer.set_result((unpacked(state), {}))
        self._begun[generation] = Ahead(prompts, state["version"], state["begun"], answer)

    # ---- in the background ------------------------------------------------------------------------------------------

    async def _in_turn(self, asked: Asked) -> Answer:
        try:
            async with self._turn:
                started = time.perf_counter()
                groups = await asked
                return groups, {"rollout/seconds_ahead": time.perf_counter() - started}
        finally:
            asked.close()  # where its turn never came


def shared_ahead(
    states: Sequence[dict[int, dict[str, Any]]], places: Sequence[Sequence[int]], wanted: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Of the `state` of several processes, with the prompts at `places`, that of one with those at `wanted`; without
    generations that not all of them have."""
    found = {}
    for number in sorted(set.intersection(*map(set, states))):
        parts = [state[number] for state in states]
        groups = chosen([unpacked(part) for part in parts], places, wanted)
        found[number] = {"version": parts[0]["version"], "begun": parts[0]["begun"], **packed(groups)}
    return found


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def packed(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Groups as a checkpoint takes them."""
    completions = [completion for group in groups for completion in group]
    return {
        "groups": [len(group) for group in groups],
        "lengths": [len(c.token_ids) for c in completions],
        "token_ids": torch.tensor([token for c in completions for token in c.token_ids], dtype=torch.int64),
        "logprobs": torch.tensor([value for c in completions for value in c.logprobs], dtype=torch.float64),
        "texts": [c.text for c in completions],
        "truncated": [c.is_truncated for c in completions],
        "versions": [c.weight_version for c in completions],
        "partial": [c.is_partial for c in completions],
    }


def unpacked(state: dict[str, Any]) -> list[list[Completion]]:
    """What `packed` was given."""
    ids, logprobs = (state[name].split(state["lengths"]) for name in ("token_ids", "logprobs"))
    rows = zip(ids, logprobs, *(state[name] for name in ("texts", "truncated", "versions", "partial")), strict=True)
    completions = iter([Completion(i.tolist(), p.tolist(), *row) for i, p, *row in rows])
    return [[next(completions) for _ in range(count)] for count in state["groups"]]
