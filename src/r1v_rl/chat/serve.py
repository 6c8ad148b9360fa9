"""`r1v-rl chat --serve`: vLLM's OpenAI-compatible server, with the flags that the model needs."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import torch

from r1v_rl.chat.config import LOOPBACK, ChatConfig
from r1v_rl.errors import RecipeError
from r1v_rl.rollout.model_folder import folder_with, saved_dtype
from r1v_rl.runtime import children_prepared, die_with_parent

API_KEY = "VLLM_API_KEY"
"""Read by vLLM itself: a key on a command line can be seen by every user of the machine."""


def serve(config: ChatConfig, processor: Any) -> int:
    """Runs until the server ends or a signal ends it; vLLM's exit code.

    Raises:
        RecipeError: If the server could be reached from elsewhere and asks for no key.
    """
    if config.host not in LOOPBACK and not os.environ.get(API_KEY):
        raise RecipeError(
            f"`host` {config.host} can be reached from other machines: set the environment variable {API_KEY} to a key "
            f"that clients must send, or leave `host` at {LOOPBACK[0]}"
        )
    with folder_with(processor, str(config.model_name_or_path)) as folder, children_prepared():
        words = server_command(config, processor, folder)
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | environment
        parent = os.getpid()
        server = subprocess.Popen(words, env=environment, preexec_fn=lambda: die_with_parent(parent))
        previous = signal.signal(signal.SIGTERM, lambda number, _: server.send_signal(number))
        try:
            return _waited(server)
        finally:
            signal.signal(signal.SIGTERM, previous)


def server_command(config: ChatConfig, processor: Any, folder: str) -> list[str]:
    """The command line of vLLM's server."""
    model = str(config.model_name_or_path)
    sampling = config.sampling(config.max_completion_length)
    defaults = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_tokens,
    }
    flags = {
        "host": config.host,
        "port": config.port,
        "served-model-name": model,
        "dtype": saved_dtype(model) if config.dtype == "auto" else config.dtype,
        "max-model-len": config.vllm_max_model_length,
        "limit-mm-per-prompt": json.dumps({"image": config.max_images}),
        "override-generation-config": json.dumps(defaults),
        "tensor-parallel-size": config.vllm_tensor_parallel_size,
        "gpu-memory-utilization": config.vllm_gpu_memory_utilization,
        "kv-cache-memory-bytes": config.vllm_kv_cache_memory_bytes,
        "seed": config.seed,
        "reasoning-parser": "deepseek_r1" if _has_think_tokens(processor) else None,
    }
    # not `vllm serve`, which asks for the metadata of a package of that name: on a CPU it is called vllm-cpu
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    for name, value in flags.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return words + ([] if torch.cuda.is_available() else ["--enforce-eager"])


def _has_think_tokens(processor: Any) -> bool:
    """Whether `<think>` and `</think>` are tokens, which is what vLLM's parser looks for."""
    return {"<think>", "</think>"} <= set(processor.tokenizer.get_vocab())


def _waited(server: subprocess.Popen) -> int:
    """The server's exit code; Ctrl-C reaches it by itself, and it takes a moment to leave."""
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:
            continue
