"""Child processes of a chain: they end with it, however it ends, and signals reach the command, once."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from r1v_rl.runtime import DIE_WITH_PARENT, die_with_parent

_TICK_S = 5.0


class Children:
    """Runs one command at a time; a context in which SIGINT, SIGTERM and SIGHUP go to it.

    A child is the leader of its own session, so that Ctrl-C reaches it from here alone and not twice: for a training
    command the second signal means "at once, without a checkpoint".
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that ended the run, or None."""
        self._process: subprocess.Popen | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and a shell's background job
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], *, keep_open: int, on_tick: Callable[[], None] = lambda: None) -> int:
        """Exit code of the command (128 + N where signal N killed it), its output passed through.

        Args:
            keep_open: Descriptor that the child inherits (the chain's lock: held until the child is gone too).
            on_tick: Called every few seconds.
        """
        parent = os.getpid()
        sys.stdout.flush()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, DIE_WITH_PARENT: str(parent)},
            start_new_session=True,
            pass_fds=(keep_open,),
            preexec_fn=lambda: die_with_parent(parent),
        )
        try:
            while True:
                try:
                    code = self._process.wait(timeout=_TICK_S)
                    return code if code >= 0 else 128 - code
                except subprocess.TimeoutExpired:
                    on_tick()
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._process is not None and self._process.poll() is None:
            for pid in commands_below(self._process.pid) or [self._process.pid]:
                os.kill(pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def commands_below(pid: int) -> list[int]:
    """The nearest r1v-rl processes at or below `pid`: those that a launcher started, and not the launcher.

    A launcher that is interrupted leaves at once and takes its workers down before they have a checkpoint.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    if b"-m" in words and words[words.index(b"-m") + 1] == b"r1v_rl":
        return [pid]
    return [found for child in children for found in commands_below(int(child))]
