"""vLLM's own OpenAI-compatible server with the tiny reasoning LLM, on the loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from r1v_rl.runtime import children_prepared
from r1v_rl.tiny.parts import resolve_part

START_S = 400


@contextmanager
def vllm_server(log, *flags):
    """vLLM's OpenAI-compatible server with the tiny reasoning LLM; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_part("tiny/reasoning_llm")),
        "--served-model-name", "judge", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1",
        "--port", str(port), "--max-model-len", "1024", *flags,
    ]  # fmt: skip
    with children_prepared(), open(log, "w") as output:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + START_S
        while not _is_up(port):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False
