"""The processes that a round starts: one that answers and one that trains. Neither outlives the one that started it."""

import multiprocessing
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from r1v_rl.errors import UserError
from r1v_rl.runtime import DIE_WITH_PARENT, die_with_parent


def in_child(function: Callable[..., None], *arguments: Any) -> None:
    """Call a module's function in a fresh process, so that what it loads (an inference engine) is gone afterwards.

    Raises:
        UserError: As the function raised it.
        RuntimeError: If it raised anything else (its traceback is on stderr) or was killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, os.getpid(), function, arguments))
    process.start()
    theirs.close()
    try:
        error = ours.recv()
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} ended with exit code {process.exitcode}") from None
    except BaseException:
        process.kill()
        process.join()
        raise
    if error is not None:
        raise error


def run_command(command: Sequence[str]) -> int:
    """The exit code of a command, as a shell gives it (137 for SIGKILL). Ctrl-C and SIGTERM reach it once, and it is
    waited for: it leaves a checkpoint. The ranks of a launcher end with this process too, from their start on."""
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        start_new_session=True,
        env={**os.environ, DIE_WITH_PARENT: str(parent)},
        preexec_fn=lambda: die_with_parent(parent),
    )
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    except BaseException as error:
        process.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
        process.wait()
        raise


def _call(channel: Connection, parent: int, function: Callable[..., None], arguments: tuple) -> None:
    die_with_parent(parent)
    try:
        function(*arguments)
    except UserError as error:
        channel.send(error)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    else:
        channel.send(None)
