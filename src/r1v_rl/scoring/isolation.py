"""A reward of the user's in a process of its own: inputs handed as copies, a deadline that holds, no orphan."""

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.handover import frame, state_to_json, to_json, unframe
from r1v_rl.scoring.plugins import Source
from r1v_rl.secret_values import without_secrets

START_S = 120.0
"""How long the import of a reward file may take."""
_HANDLES = ("trainer_state", "log_extra", "log_metric")


class PluginProcess:
    """The process of one function; it starts at once, so that a file that does not import is known before training.

    Args:
        name: Of the function.
        variables: Of the environment, that it is to see although they are named like secrets; no other secret is there.

    Raises:
        RewardError: If the function cannot be loaded.
    """

    def __init__(self, name: str, variables: Sequence[str] = ()):
        self._name, self._variables = name, variables
        self._label = name.rpartition(":")[2].rpartition(".")[2]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._owner_pid = os.getpid()
        self.per_completion = False
        """What the function says of itself (`RewardFunction.per_completion`)."""
        self.source = self._start()
        atexit.register(self.close)

    def call(self, arguments: dict[str, Any], timeout_s: float) -> tuple[list[float | None], list[str]]:
        """The rewards, and what is wrong with single ones; what the function logs is logged.

        Raises:
            RewardError: If it raises, dies, does not end within `timeout_s`, or returns no list of rewards; or if an
                argument cannot be handed over.
        """
        handles = {key: arguments[key] for key in _HANDLES if key in arguments}
        message = {
            "arguments": {key: self._handed(key, value) for key, value in arguments.items() if key not in _HANDLES},
            "trainer_state": state_to_json(handles.get("trainer_state")),
            "handles": [key for key, value in handles.items() if value is not None],
        }
        with self._lock:
            if os.getpid() != self._owner_pid or self._process is None:
                self._process, self._owner_pid = None, os.getpid()
                self._start()
            reply = self._ask(message, timeout_s, f"end within {timeout_s:g} s (`reward_timeout_s` a completion)")
        if "error" in reply:
            raise RewardError(reply["error"] + self._withheld(reply) + _called_with(arguments) * ("died" in reply))
        for handle, key, value in reply["logs"]:
            handles[handle](key, value)
        return reply["rewards"], reply["problems"]

    def close(self) -> None:
        """Kill the process and everything it started; safe to call twice. A call in another thread fails at once."""
        process = self._process
        if os.getpid() == self._owner_pid and process is not None:
            _kill_group(process)  # before the lock, which that call holds
        with self._lock:
            if os.getpid() == self._owner_pid:
                self._kill()

    def _handed(self, key: str, value: Any) -> Any:
        try:
            return to_json(value)
        except TypeError as error:
            raise RewardError(
                f"reward function {self._label!r} runs in a process of its own, and column {key!r} holds a {error}, "
                "which cannot be handed over: store it as text, numbers, bytes or an image"
            ) from error

    def _withheld(self, reply: dict[str, Any]) -> str:
        """A hint, where the function failed over a variable that it was not given."""
        left_out = os.environ.keys() - without_secrets(os.environ, self._variables)
        named = sorted(name for name in left_out if name in reply["error"])
        return f"; secrets are withheld from it: name {', '.join(named)} in `reward_env`" if named else ""

    def _start(self) -> Source:
        ours, theirs = socket.socketpair()
        environment = without_secrets(os.environ, self._variables)
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "r1v_rl.scoring.plugin_process", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer alone; what it starts can be ended with it
            )
        self._channel = ours
        reply = self._ask(self._name, START_S, f"load within {START_S:g} s")
        if "error" in reply:
            self._kill()
            raise RewardError(reply["error"] + self._withheld(reply))
        self.per_completion = reply["per_completion"]
        return Source(reply["path"], reply["sha256"])

    def _ask(self, message: Any, timeout_s: float, must: str) -> dict[str, Any]:
        assert self._channel is not None and self._process is not None
        deadline = time.monotonic() + timeout_s
        received = bytearray()
        try:
            self._channel.settimeout(timeout_s)
            self._channel.sendall(frame(message))
            while True:
                with contextlib.suppress(KeyError):
                    return unframe(received)
                poller = select.poll()
                poller.register(self._channel, select.POLLIN)
                if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError
                chunk = self._channel.recv(1 << 20)
                if not chunk:
                    raise EOFError
                received += chunk
        except TimeoutError:
            self._kill()
            return {"error": f"reward function {self._label!r} must {must}; it did not, and was killed", "died": True}
        except (OSError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            code = self._process.returncode
            self._kill()
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return {
                "error": f"reward function {self._label!r} must return rewards; its process ended ({how})",
                "died": 1,
            }

    def _kill(self) -> None:
        if self._process is not None:
            _kill_group(self._process)
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _called_with(arguments: dict[str, Any]) -> str:
    first = (arguments.get("id") or ["at position 0"])[0]
    return f" (called with {len(arguments['completions'])} completions, the first of row {first!r})"
