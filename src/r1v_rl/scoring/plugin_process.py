"""The process in which one reward of the user's runs: it loads the function and answers calls until the trainer goes.

Run as `python -P -m r1v_rl.scoring.plugin_process FD PARENT_PID` by `r1v_rl.scoring.isolation`.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.handover import frame, from_json, state_from_json, unframe
from r1v_rl.scoring.loader import RewardFunction
from r1v_rl.scoring.plugins import find_plugin


def serve(channel: socket.socket) -> None:
    """Load the function that the first message names, then call it for every further one."""
    name = _receive(channel)
    try:
        function, source = find_plugin(name)
    except RewardError as error:
        channel.sendall(frame({"error": str(error)}))
        return
    label = name.rpartition(":")[2].rpartition(".")[2]
    reward = RewardFunction(label, function, source=source)
    own_pid = os.getpid()
    channel.sendall(frame({"path": source.path, "sha256": source.sha256, "per_completion": reward.per_completion}))
    while (message := _receive(channel)) is not None:
        reply = call(reward, message)
        if os.getpid() != own_pid:  # a copy that the function forked: only the original answers
            os._exit(0)
        channel.sendall(frame(reply))


def call(reward: RewardFunction, message: dict[str, Any]) -> dict[str, Any]:
    """The rewards, what is wrong with single ones, and what the function logged; or `error`."""
    logs: list[tuple[str, str, Any]] = []
    arguments = from_json(message["arguments"])
    handles = {
        "trainer_state": state_from_json(message["trainer_state"]),
        "log_extra": lambda column, values: logs.append(("log_extra", str(column), _plain(list(values)))),
        "log_metric": lambda name, value: logs.append(("log_metric", str(name), float(value))),
    }
    arguments |= {key: handles[key] for key in message["handles"]}
    try:
        rewards, problems = reward.judge(**arguments)
    except RewardError as error:
        return {"error": str(error)}
    return {"rewards": rewards, "problems": problems, "logs": logs}


def _plain(values: list[Any]) -> list[Any]:
    return [
        value if isinstance(value, str | int | float | bool) or value is None else str(value)[:1000] for value in values
    ]


def _receive(channel: socket.socket) -> Any:
    received = bytearray()
    while True:
        with contextlib.suppress(KeyError):
            return unframe(received)
        chunk = channel.recv(1 << 20)
        if not chunk:
            return None
        received += chunk


def main(descriptor: int, parent_pid: int) -> None:
    """Serve, and end with the trainer."""
    if os.getppid() != parent_pid:
        return
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    serve(socket.socket(fileno=descriptor))


def _end_with_parent(parent_pid: int) -> None:
    """PR_SET_PDEATHSIG would end this process with the thread that started it, which may end before the trainer."""
    pidfd = os.pidfd_open(parent_pid)
    select.select([pidfd], [], [])
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:3]))
