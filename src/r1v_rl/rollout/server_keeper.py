"""A thread that sees to it that every rollout server runs and holds the present weights, whatever befalls it."""

import asyncio
import logging
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from r1v_rl.errors import UserError
from r1v_rl.rollout.server_client import ServerClient, ServerFault
from r1v_rl.rollout.vllm_server import end_servers, log_tail

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_STARTS = 3
"""Starts in a row that may fail."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What every server shall hold."""

    run: str
    """The first part of `version`: a server that holds another run's weights gets all of them."""
    number: int
    """Of the hand-over, the second part."""
    step: int
    """Optimizer steps behind them."""
    frozen: tuple[str, ...]
    """Files of what never changes."""
    trained: tuple[str, ...]

    @property
    def version(self) -> str:
        return f"{self.run}:{self.number}"


@dataclass(slots=True)
class Server:
    """One server as the keeper knows it."""

    url: str
    start: Callable[[], subprocess.Popen] | None = None
    """Starts it, where it is the run's own."""
    log: Path | None = None
    process: subprocess.Popen | None = None
    failed_starts: int = 0
    answered: bool = False
    """The run's own: since it was started. One by address: ever."""
    checked: bool = False
    """Whether its settings were looked at since it was last gone."""
    holds: str | None = None
    """The version of its weights; None where it does not say."""
    reads: Weights | None = None
    """Whose files it is reading now."""
    fault: ServerFault | None = None
    """Why it does not say what it holds."""
    since: float = field(default_factory=time.monotonic)
    """When it last answered, or was started."""


class ServerKeeper:
    """Starts the run's own servers, again where they end or hang, and gives weights to every one that lacks them.

    Args:
        key: Sent to every server.
        timeout_s: How long a server that listens may say nothing, and how long one by address may be gone.
        start_timeout_s: How long a server may take to start, and to load weights.
        check: Raises UserError where vLLM's configuration is not what the run needs.
    """

    def __init__(
        self,
        servers: list[Server],
        key: str | None,
        *,
        timeout_s: float,
        start_timeout_s: float,
        check: Callable[[str, dict], None],
    ):
        self.servers = servers
        self._key, self._check = key, check
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._weights: Weights | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self._wake: list[asyncio.Event] = []
        self._thread = threading.Thread(target=self._run, name="rollout servers", daemon=True)
        self._thread.start()

    def hold(self, weights: Weights) -> None:
        """Returns when these weights are held: by all servers the first time, then by all that answer.

        Raises:
            UserError: If there is none, or a server is not what the run needs.
        """
        with self._changed:
            first, self._weights = self._weights is None, weights
        self._look()
        with self._changed:
            while True:
                self.raise_error()
                lacking = [server for server in self.servers if server.holds != weights.version]
                lost = [server for server in lacking if self._is_lost(server)]
                if len(lost) == len(self.servers) or (first and lost):
                    raise UserError(self._said(lost))
                waits = lacking if first or len(lacking) == len(self.servers) else [s for s in lacking if not s.fault]
                if not waits:
                    return
                self._changed.wait(0.5)

    def files_in_use(self) -> set[str]:
        """Those of the present weights, and of older ones that a server is still reading."""
        with self._changed:
            used = [self._weights, *(server.reads for server in self.servers)]
        return {path for weights in used if weights is not None for path in (*weights.frozen, *weights.trained)}

    def raise_error(self) -> None:
        """Raises what cannot be mended by waiting."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the run's own servers, and the thread; may be called again."""
        self._closed = True
        if self._loop is not None and self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(30)

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._keep_all())
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:  # here, since a child dies with the thread that started it
            end_servers(*(server.process for server in self.servers if server.process is not None))

    async def _keep_all(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._wake = [asyncio.Event() for _ in self.servers]
        await asyncio.gather(*(self._keep(*pair) for pair in zip(self.servers, self._wake, strict=True)))

    async def _keep(self, server: Server, wake: asyncio.Event) -> None:
        client = ServerClient(server.url, self._key, self._timeout_s)
        try:
            while not self._closed:
                wake.clear()
                try:
                    self._start_where_ended(server)
                    await self._renew(server, client)
                except ServerFault as fault:
                    self._note(server, fault)
                server.reads = None
                with self._changed:
                    self._changed.notify_all()
                try:
                    await asyncio.wait_for(wake.wait(), _LOOK_S)
                except TimeoutError:
                    continue
        finally:
            await client.close()

    async def _renew(self, server: Server, client: ServerClient) -> None:
        held = await client.version()
        with self._changed:
            weights = server.reads = self._weights
        if not server.checked:
            self._check(server.url, await client.settings())
            server.answered, server.checked, server.failed_starts = True, True, 0
        if weights is not None and held != weights.version:
            server.holds = None
            everything = not held.startswith(f"{weights.run}:")
            files = [*(weights.frozen if everything else ()), *weights.trained]
            await client.load(files, weights.version, timeout_s=self._start_timeout_s)
            held = weights.version
            if server.fault or everything:
                logger.warning("rollout server %s holds the weights of step %d", server.url, weights.step)
        server.holds, server.fault, server.since = held, None, time.monotonic()

    def _start_where_ended(self, server: Server) -> None:
        if server.start is None or (server.process is not None and server.process.poll() is None):
            return
        if server.process is not None:
            server.failed_starts += not server.answered
            if server.failed_starts >= _STARTS:
                raise UserError(self._said([server]))
            logger.warning(
                "rollout server %s ended (exit code %d) and is started again", server.url, server.process.returncode
            )
        server.process, server.holds, server.since = server.start(), None, time.monotonic()
        server.answered = server.checked = False

    def _note(self, server: Server, fault: ServerFault) -> None:
        if server.answered and server.fault is None:
            logger.warning("rollout server %s is left out: %s", server.url, fault)
        server.holds, server.fault = None, fault
        server.checked = server.checked and fault.answers
        patience = self._timeout_s if server.answered else self._start_timeout_s
        if server.process is not None and time.monotonic() - server.since > patience:
            end_servers(server.process, at_once=True)

    # ---- what is known ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        for event in self._wake:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(event.set)

    def _is_lost(self, server: Server) -> bool:
        """Whether it has been waited for long enough; the run's own is until its starts have failed."""
        if server.start is not None or server.fault is None:
            return False
        gone_at_first = not server.fault.answers and not server.answered
        patience = self._start_timeout_s if gone_at_first else self._timeout_s
        return time.monotonic() - server.since > patience

    def _said(self, servers: list[Server]) -> str:
        lines = [f"{server.url}: {server.fault or 'it ends'}" for server in servers]
        tails = [f"{server.log}:\n{log_tail(server.log)}" for server in servers if server.log is not None]
        return (
            f"no rollout server answers: {'; '.join(lines)}. Waited {self._timeout_s:g} s (`rollout_timeout_s`), for a "
            f"start {self._start_timeout_s:g} s (`vllm_server_timeout`)" + "".join(f"\n{tail}" for tail in tails)
        )
