"""Start, talk to and kill grader processes: the operating-system side of `r1v_rl.scoring.workers`."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

_PID_BYTES = 4
_START_S = 60.0
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class WorkerDied(Exception):
    """The worker process closed its end before it answered."""


class Worker:
    """One grader process and the socket to it."""

    def __init__(self, pid: int, channel: socket.socket):
        self.pid = pid
        self.channel = channel
        self._pidfd = os.pidfd_open(pid)  # a pid can be reused by another process, this cannot
        self._received = b""
        self.should_retire = False

    def is_alive(self) -> bool:
        """Whether an idle worker is still there: nothing is readable from it but the end of its socket."""
        return not select.select([self.channel], [], [], 0)[0]

    def send(self, request: dict[str, Any], timeout_s: float) -> None:
        """Hand over one request.

        Raises:
            WorkerDied: If it does not take it.
        """
        self.channel.settimeout(timeout_s)
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise WorkerDied from error

    def receive(self) -> dict[str, Any] | None:
        """The reply, or None while only a part of it has come; called when the socket is readable."""
        try:
            chunk = self.channel.recv(65536)
        except OSError as error:
            raise WorkerDied from error
        if not chunk:
            raise WorkerDied
        self._received += chunk
        if not self._received.endswith(b"\n"):
            return None
        reply = json.loads(self._received)
        self._received = b""
        self.should_retire = bool(reply.get("retire"))
        return reply

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it down."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        select.select([self._pidfd], [], [], 1.0)
        self.close()

    def close(self) -> None:
        """Let go of the socket without ending the process, which ends itself when every copy is closed."""
        self.channel.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Forker:
    """The process that has sympy loaded and forks workers; started on first use, and again if it has died."""

    def __init__(self, memory_mb: int):
        self._memory_mb = memory_mb
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self.start_s = 0.0
        """Seconds from the last start until it could fork."""

    def start(self) -> None:
        """Start the process and return at once; `fork_worker` waits for it."""
        with self._lock:
            if self._process is None:
                self._start()

    def fork_worker(self) -> Worker:
        """A fresh worker.

        Raises:
            RuntimeError: If no grader process can be started.
        """
        with self._lock:
            for _ in range(2):
                if self._process is None:
                    self._start()
                try:
                    return self._fork()
                except (OSError, EOFError):
                    self._stop()
            raise RuntimeError(
                "cannot start the grader process; try `python -P -m r1v_rl.scoring.grader_process 0 0 2048` by hand, "
                "which "
                "must fail only for its socket"
            )

    def stop(self) -> None:
        """Kill it and wait for it."""
        with self._lock:
            self._stop()

    def abandon(self) -> None:
        """Close this process's end after a fork of the trainer: the grader belongs to the parent."""
        if self._control is not None:
            self._control.close()
        self._process = self._control = None
        self._is_ready = False
        self._lock = threading.Lock()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # LD_PRELOAD and the rest of what an inference engine exports must not reach the graders; the hash seed makes
        # sympy's orderings, and with them the verdicts, the same in every run.
        environment = {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "0"}
        arguments = [str(theirs.fileno()), str(os.getpid()), str(self._memory_mb)]
        self.start_s = -time.monotonic()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "r1v_rl.scoring.grader_process", *arguments],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer alone
            )
        ours.settimeout(_START_S)
        self._control, self._is_ready = ours, False

    def _fork(self) -> Worker:
        assert self._control is not None
        if not self._is_ready:
            self._read_pid()
            self._is_ready = True
            self.start_s += time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            return Worker(self._read_pid(), ours)
        except (OSError, EOFError):
            ours.close()
            raise

    def _read_pid(self) -> int:
        assert self._control is not None
        data = b""
        while len(data) < _PID_BYTES:
            chunk = self._control.recv(_PID_BYTES - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return int.from_bytes(data, "big")

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None
        self._is_ready = False
