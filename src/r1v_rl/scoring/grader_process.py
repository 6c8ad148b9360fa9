"""The grader processes: one parent that has sympy loaded and forks workers on request, and the loop that a worker runs.

Run as `python -P -m r1v_rl.scoring.grader_process CONTROL_FD PARENT_PID MEMORY_MB` by `r1v_rl.scoring.workers`. A fork
of this small single-threaded process costs milliseconds where a new interpreter with sympy costs most of a second, and
the trainer itself, with its threads and its accelerator, is never forked.
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

from r1v_rl.scoring.equivalence import Unreadable, forget, read_formula, same_value

PID = struct.Struct("!i")
_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 0.5
_libc = ctypes.CDLL(None, use_errno=True)


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; `error` names the side that cannot be read."""
    try:
        forget()
        if request["op"] == "same":
            return {"correct": same_value(request["gold"], request["answer"])}
        if request["op"] == "read":
            read_formula(request["gold"])
            return {"correct": True}
        assert request["op"] == "match", request["op"]
        return {"correct": re.search(request["pattern"], request["text"]) is not None}
    except Unreadable as error:
        return {"error": error.side}
    except MemoryError:
        return {"error": "answer", "retire": True}
    except Exception:
        return {"error": "gold" if request["op"] == "read" else "answer"}


def serve(channel: socket.socket) -> None:
    """Answer requests, one JSON object a line, until the other end closes."""
    with channel, channel.makefile("rb") as requests:
        for line in requests:
            channel.sendall(json.dumps(answer_request(json.loads(line))).encode() + b"\n")


def run_worker(channel: socket.socket, forker_pid: int, memory_mb: int) -> None:
    """Serve in a fresh fork: it dies with its parent, and cannot take more memory than allowed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != forker_pid:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(channel)


def warm_up() -> None:
    """Run the usual paths of the parser and of sympy once, so that no worker pays for their first call."""
    for gold, answer in (
        (r"\frac{1}{2}+x^2", r"x^2+0.5"),
        (r"\{1,\sqrt{2}\}", r"\sqrt{2},1"),
        (r"(1,3]", r"1<x\le 3"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}"),
        (r"2\pi\text{ cm}", r"6.283185"),
        (r"x=2y", r"2y-x=0"),
        (r"\sin^2 x+\cos^2 x", "1"),
    ):
        with contextlib.suppress(Unreadable):
            same_value(gold, answer)


def main(control_fd: int, parent_pid: int, memory_mb: int) -> None:
    """Fork a worker for every socket that arrives, and end when the process that started this one has gone."""
    own_pid = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    warm_up()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    control.sendall(PID.pack(own_pid))
    while os.getppid() == parent_pid:
        if not select.select([control], [], [], _PARENT_CHECK_S)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        channel = socket.socket(fileno=descriptors[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                run_worker(channel, own_pid, memory_mb)
            finally:
                os._exit(0)
        channel.close()
        control.sendall(PID.pack(pid))


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:4]))
