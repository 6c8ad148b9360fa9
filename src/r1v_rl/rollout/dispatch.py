"""Prompts spread over rollout servers by load; what a lost server had in hand goes to the others."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field

from r1v_rl.errors import UserError
from r1v_rl.rollout.server_client import Reply, ServerClient, ServerFault

_LOOK_S = 1.0
_FIRST_LOOK_S = 2.0
"""How long the first requests wait for a server that has not said yet what it holds."""
_TRIES = 5
_TRIES_OF_A_HANG = 2
"""Of one prompt, and what it counts that a server hung over it."""
_AT_ONCE = 512
"""Completions in hand at one server; others wait here, for whichever server is free first."""
_STOP_S, _STOP_AGAIN_S = 5.0, 0.2
"""How long what was stopped is waited for, and when it is told again."""


@dataclass(slots=True)
class _Worker:
    """One server during one call."""

    client: ServerClient
    ready: bool = False
    in_hand: int = 0
    """Completions."""
    requests: set[asyncio.Task] = field(default_factory=set)
    asked: dict[int, asyncio.Task] = field(default_factory=dict)
    """Those of them that it has in hand, by the number of their prompt."""
    tokens: float = -1.0
    since: float = field(default_factory=time.monotonic)
    """When it last got further, or was lost."""
    fault: ServerFault | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatch:
    """One batch of prompts for the servers that hold the weights of `version`.

    A request has no time limit of its own: a server is left out when its tokens do not become more for `timeout_s`.

    Args:
        clients: One a server.
        first: Which of equally loaded servers comes first.
        timeout_s: How long a server may make no progress.
        patience_s: How long one that is left out is waited for, where no other is left.
        watch: Called now and then; may raise.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        version: str,
        *,
        first: int,
        timeout_s: float,
        patience_s: float,
        watch: Callable[[], None],
    ):
        self._workers = [_Worker(clients[(first + i) % len(clients)]) for i in range(len(clients))]
        self._version, self._timeout_s, self._patience_s, self._watch = version, timeout_s, patience_s, watch
        self._rows: Sequence[str] = ()
        self._todo: deque[int] = deque()
        self._replies: dict[int, Reply] = {}
        self._on_reply: Callable[[int, Reply], None] | None = None
        self._tries: dict[int, int] = {}
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._stopping = False
        self.retries = 0

    async def all(
        self, bodies: Sequence[dict], rows: Sequence[str], on_reply: Callable[[int, Reply], None] | None = None
    ) -> list[Reply]:
        """A reply to each, in order, made with the weights of `version`; `rows` names them in messages.

        Args:
            on_reply: Told of each reply that counts, with its number, when it is there; what it raises ends the call.

        Raises:
            UserError: If no server is left, or one prompt fails again and again.
        """
        self._on_reply = on_reply
        await self._run(bodies, rows, lambda answered: len(answered) == len(bodies))
        return [self._replies[number] for number in range(len(bodies))]

    async def first(
        self, bodies: Sequence[dict], rows: Sequence[str], enough: Callable[[Set[int]], bool]
    ) -> list[Reply | None]:
        """As `all`, until `enough` says of the numbers answered so far that no more are needed. The others are stopped:
        of some completions there is a part then (`Reply.stopped`), and nothing of what no server had begun or what did
        not come back within seconds."""
        await self._run(bodies, rows, enough)
        return [self._replies.get(number) for number in range(len(bodies))]

    async def _run(self, bodies: Sequence[dict], rows: Sequence[str], enough: Callable[[Set[int]], bool]) -> None:
        self._rows = rows
        self._todo.extend(range(len(bodies)))
        attending = [asyncio.create_task(self._attend(worker)) for worker in self._workers]
        looks = [asyncio.create_task(worker.answered.wait()) for worker in self._workers]
        try:
            await asyncio.wait(looks, timeout=_FIRST_LOOK_S)
            while not enough(self._replies.keys()):
                self._send(bodies)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), _LOOK_S)
                self._news.clear()
                self._watch()
                if self._error is not None:
                    raise self._error
                self._give_up_where_none_is_left()
            await self._stop(bodies)
        finally:
            tasks = [*attending, *looks, *(task for worker in self._workers for task in worker.requests)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_ready(self) -> int:
        """Servers that may be asked."""
        return sum(worker.ready for worker in self._workers)

    def _send(self, bodies: Sequence[dict]) -> None:
        while self._todo:
            free = [worker for worker in self._workers if worker.ready and worker.in_hand < _AT_ONCE]
            if not free:
                return
            worker, number = min(free, key=lambda worker: worker.in_hand), self._todo.popleft()
            if not worker.in_hand:
                worker.since = time.monotonic()
            worker.in_hand += bodies[number]["sampling_params"]["n"]
            task = asyncio.create_task(self._ask(worker, number, bodies[number]))
            worker.requests.add(task)
            worker.asked[number] = task
            task.add_done_callback(worker.requests.discard)

    async def _stop(self, bodies: Sequence[dict]) -> None:
        """What the servers have in hand ends as it is; what does not come back is given up with its connection."""
        self._stopping, until = True, time.monotonic() + _STOP_S
        while (busy := [w for w in self._workers if w.asked]) and time.monotonic() < until:
            told = [w.client.stop([bodies[n]["request_id"] for n in w.asked], timeout_s=_STOP_S) for w in busy]
            for failed in await asyncio.gather(*told, return_exceptions=True):
                if failed is not None and not isinstance(failed, ServerFault):
                    raise failed
            if left := [task for worker in busy for task in worker.asked.values()]:
                await asyncio.wait(left, timeout=_STOP_AGAIN_S)

    async def _ask(self, worker: _Worker, number: int, body: dict) -> None:
        try:
            reply = await worker.client.generate(body)
            if reply.weight_version != self._version:
                raise ServerFault(
                    f"it answered with other weights ({reply.weight_version or 'changing'})", answers=True
                )
            if any(reply.stopped) and not self._stopping:
                raise ServerFault("it ended completions before their time", answers=True)
            self._replies[number] = reply
            if self._on_reply is not None:
                self._on_reply(number, reply)
        except ServerFault as fault:
            del worker.asked[number]
            if not self._stopping:
                await self._again(worker, number, fault)
        except asyncio.CancelledError:  # its server was given up
            if self._stopping:
                raise
            hangs = worker.fault is not None and worker.fault.answers
            self._failed(worker, number, worker.fault, tries=_TRIES_OF_A_HANG if hangs else 1)
            self._todo.appendleft(number)
            raise
        except Exception as error:
            self._error = error
        finally:
            worker.asked.pop(number, None)
            worker.in_hand -= body["sampling_params"]["n"]
            self._news.set()

    async def _again(self, worker: _Worker, number: int, fault: ServerFault) -> None:
        """A failed request waits a little longer each time; its server is looked at anew before it is asked again."""
        self._failed(worker, number, fault)
        if worker.ready:
            worker.since = time.monotonic()
            self._lose(worker, fault)
        try:
            await asyncio.sleep(0.25 * 2 ** self._tries[number])
        finally:
            self._todo.appendleft(number)

    def _failed(self, worker: _Worker, number: int, fault: ServerFault | None, tries: int = 1) -> None:
        self._tries[number] = self._tries.get(number, 0) + tries
        self.retries += 1
        if self._tries[number] >= _TRIES:
            self._error = UserError(
                f"row {self._rows[number]}: no rollout server could answer it, however often it was asked; last at "
                f"{worker.client.url}: {fault}"
            )

    def _lose(self, worker: _Worker, fault: ServerFault) -> None:
        worker.ready, worker.fault = False, fault
        self._news.set()

    async def _attend(self, worker: _Worker) -> None:
        """Look at a server every second: what it holds before it is asked, whether it gets further while it is."""
        while True:
            try:
                if not worker.ready:
                    held = await worker.client.version()
                    if held != self._version:
                        raise ServerFault(f"it holds other weights ({held})", answers=True)
                    worker.ready, worker.fault, worker.tokens, worker.since = True, None, -1.0, time.monotonic()
                elif worker.in_hand:
                    await self._look_at_progress(worker)
            except ServerFault as fault:
                if worker.ready:
                    self._lose(worker, fault)
                worker.fault = fault
                if not fault.answers or time.monotonic() - worker.since > self._timeout_s:
                    for request in worker.requests:
                        request.cancel()
            except Exception as error:
                self._error = error
            worker.answered.set()
            self._news.set()
            await asyncio.sleep(_LOOK_S)

    async def _look_at_progress(self, worker: _Worker) -> None:
        tokens = await worker.client.tokens_done()
        if tokens != worker.tokens:
            worker.tokens, worker.since = tokens, time.monotonic()
        elif time.monotonic() - worker.since > self._timeout_s:
            raise ServerFault(f"it makes no progress for {self._timeout_s:g} s", answers=True)

    def _give_up_where_none_is_left(self) -> None:
        now = time.monotonic()
        if all(not w.ready and w.fault and now - w.since > self._patience_s for w in self._workers):
            lines = "; ".join(f"{worker.client.url}: {worker.fault}" for worker in self._workers)
            raise UserError(
                f"no rollout server is left after {self._patience_s:g} s (`rollout_timeout_s`): {lines}; "
                "mend the servers and go on from the last checkpoint"
            )
