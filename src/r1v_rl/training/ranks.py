"""The ranks of a run look after each other: when one is lost, all of them end soon, with a message that names it.

Launchers see a rank that ended, and not one that was stopped; collectives wait half an hour for both; neither says
which rank it was, and what to do.
"""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from torch.distributed import PrefixStore, TCPStore

from r1v_rl.checkpoints import checkpoint_folders
from r1v_rl.errors import RankError
from r1v_rl.runtime import outlive_launcher
from r1v_rl.tracking.redaction import redact

_POLL_S = 0.5
_STORE_TIMEOUT_S = 10.0
_GRACE_S = 4.0
"""From the loss of a rank to the end of one that does not end by itself, as in a long rollout."""

_blocks = 0  # as many on every rank: a block's keys in the launcher's store are its own
_watching = False


@contextmanager
def watched_ranks(args: Any) -> Iterator[None]:
    """Within the block, the end of any rank is the end of all, unless it has left the block by itself.

    Nothing for one process, inside of another such block, and where no launcher said where its store is.

    Args:
        args: The recipe: `rank_timeout_s`, `output_dir`.

    Raises:
        RankError: If another rank was lost, which is said on stderr by then, in place of what that did to this one.
    """
    global _watching
    alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    if alone or _watching or "MASTER_PORT" not in os.environ:
        yield
        return
    watch = _Watch(args.rank_timeout_s, str(args.output_dir))
    watch.thread.start()
    outlive_launcher()
    _watching = True
    # With the default a launcher would end this rank before it can say why.
    is_default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    takes_signal = is_default and threading.current_thread() is threading.main_thread()
    try:
        if takes_signal:
            signal.signal(signal.SIGTERM, watch.told_to_end)
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and watch.lost_within(_GRACE_S):
            watch.leave("ended with another rank")
            raise RankError(watch.message()) from error
        watch.leave(f"failed: {type(error).__name__}: {redact(str(error))[:500]}")
        raise
    else:
        watch.leave("")
    finally:
        if takes_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _watching = False


class _Watch:
    """A thread that looks at the other ranks' processes on this machine, and in the launcher's store for what ranks say
    that cannot go on.

    Args:
        limit_s: A rank may be stopped (SIGSTOP) for so long.
        output_dir: Where checkpoints are.
    """

    def __init__(self, limit_s: float, output_dir: str):
        global _blocks
        _blocks += 1
        self.thread = threading.Thread(target=self._run, name="watched ranks", daemon=True)
        self.rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._limit_s, self._output_dir, self._launcher = limit_s, output_dir, os.getppid()
        self._lost = ""
        self._is_lost, self._has_left = threading.Event(), threading.Event()
        self._neighbours: dict[int, _Neighbour] | None = None
        client = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT_S),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"r1v_rl/{attempt}/{_blocks}", client)
        self._store.set(f"process/{self.rank}", json.dumps([_machine(), os.getpid(), *_process(os.getpid())[1:]]))

    def lost_within(self, seconds: float) -> bool:
        """Whether another rank is lost: what befell this one may be its doing."""
        return self._is_lost.wait(seconds)

    def message(self) -> str:
        """What happened, and what to do."""
        folders = checkpoint_folders(self._output_dir)
        again = (
            f"`--resume_from_checkpoint true` goes on from {folders[0].name}"
            if folders
            else "there is no checkpoint yet (`save_steps`)"
        )
        return f"{self._lost}. Rank {self.rank} ends with it. Mend the cause and start again: {again}"

    def told_to_end(self, number: int, frame: Any) -> None:
        """For SIGTERM: launchers send it to all ranks when one has ended."""
        if not self.lost_within(_GRACE_S):
            self.leave("was told to end (SIGTERM)")
        raise SystemExit(128 + number)

    def leave(self, reason: str) -> None:
        """Tell the others why this rank leaves the block; the empty reason is that it is done."""
        if self._has_left.is_set():
            return
        if reason and not self._is_lost.is_set():
            self._first(f"rank {self.rank} ({_place(os.getpid())}) {reason}")
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", reason)
        self._has_left.set()

    def _run(self) -> None:
        while not self._has_left.wait(_POLL_S):
            self._lost = self._look()
            if self._lost:
                break
        else:
            return
        if not self._has_left.is_set():
            print(f"r1v-rl: error: {self.message()}", file=sys.stderr, flush=True)
        self._is_lost.set()
        for neighbour in self._known().values():
            neighbour.end_if_stopped()
        if not self._has_left.wait(_GRACE_S):
            os._exit(1)

    def _look(self) -> str:
        """Which rank is lost and how; empty while none is."""
        if os.getppid() != self._launcher:
            return "the launcher was killed"
        for number, neighbour in self._known().items():
            if found := neighbour.look(self._limit_s):
                if self._said(f"left/{number}") is None:
                    return self._first(f"rank {number} ({_place(neighbour.pid)}) {found}")
                neighbour.expected = True
        return self._said("lost") or ""

    def _first(self, lost: str) -> str:
        """Tell the others; what was told first is what they all say."""
        try:
            return self._store.compare_set("lost", "", lost).decode()
        except RuntimeError:  # the store went with the launcher
            return lost

    def _said(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            return None

    def _known(self) -> "dict[int, _Neighbour]":
        """The other ranks on this machine, once all have said where they are."""
        if self._neighbours is None:
            keys = [f"process/{rank}" for rank in range(self._world)]
            with suppress(RuntimeError):
                if not self._store.check(keys):
                    return {}
                found = [json.loads(value) for value in self._store.multi_get(keys)]
                self._neighbours = {
                    rank: _Neighbour(pid, started)
                    for rank, (machine, pid, started) in enumerate(found)
                    if machine == _machine() and rank != self.rank
                }
        return self._neighbours or {}


class _Neighbour:
    """The process of another rank on this machine."""

    def __init__(self, pid: int, started: str):
        self.pid, self._started = pid, started
        self.expected = False
        """Whether it said that it would leave."""
        self._gone = self._stopped = 0

    def look(self, limit_s: float) -> str:
        """What happened to it; empty while it runs. Called every `_POLL_S`: times are counted in calls, so that a
        machine that is suspended as a whole finds nothing when it wakes up."""
        if self.expected:
            return ""
        state, started = _process(self.pid)
        self._gone = self._gone + 1 if started != self._started or state in "ZX" else 0
        self._stopped = self._stopped + 1 if state == "T" else 0
        if self._gone > 1:  # what it may have said as its last is there by now
            return "was killed, by a signal or by the kernel for want of memory (`dmesg`)"
        if self._stopped * _POLL_S > limit_s:
            return (
                f"was stopped (SIGSTOP) for more than {limit_s:g} s (`rank_timeout_s`), and is killed; whoever stopped "
                f"it, a debugger, a shell or the scheduler, must let it run"
            )
        return ""

    def end_if_stopped(self) -> None:
        """It cannot heed the launcher, which would wait for it."""
        if _process(self.pid) == ("T", self._started):
            os.kill(self.pid, signal.SIGKILL)


def _process(pid: int) -> tuple[str, str]:
    """(state letter, start time in clock ticks) of a process; `X` where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


def _machine() -> str:
    """What processes that see each other have in common."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return f"{_place(os.getpid())}, without /proc"


def _place(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()}"
