"""`r1v-rl chat --serve`: vLLM's OpenAI-compatible server, with the flags that the model needs."""

import os
import signal
import subprocess
from typing import Any

from r1v_rl.chat.config import ChatConfig
from r1v_rl.rollout.model_folder import folder_with, saved_dtype
from r1v_rl.rollout.vllm_requests import logprobs_mode
from r1v_rl.rollout.vllm_server import API_KEY, start_server


def serve(config: ChatConfig, processor: Any) -> int:
    """Runs until the server ends or a signal ends it; vLLM's exit code.

    Raises:
        RecipeError: If the server could be reached from elsewhere, or takes weights, and asks for no key.
    """
    model = str(config.model_name_or_path)
    with folder_with(processor, model) as folder:
        server = start_server(
            folder,
            [model],
            server_options(config, processor),
            host=config.host,
            port=config.port,
            key=os.environ.get(API_KEY) or None,
            takes_weights=config.takes_weights,
        )
        previous = signal.signal(signal.SIGTERM, lambda number, _: server.send_signal(number))
        try:
            return _waited(server)
        finally:
            signal.signal(signal.SIGTERM, previous)


def server_options(config: ChatConfig, processor: Any) -> dict[str, Any]:
    """Options of vLLM's server."""
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
    return {
        "dtype": saved_dtype(model) if config.dtype == "auto" else config.dtype,
        "max-model-len": config.vllm_max_model_length,
        "limit-mm-per-prompt": {"image": config.max_images},
        "override-generation-config": defaults,
        "tensor-parallel-size": config.vllm_tensor_parallel_size,
        "gpu-memory-utilization": config.vllm_gpu_memory_utilization,
        "kv-cache-memory-bytes": config.vllm_kv_cache_memory_bytes,
        "seed": config.seed,
        "reasoning-parser": "deepseek_r1" if _has_think_tokens(processor) else None,
        "logprobs-mode": logprobs_mode(config.temperature) if config.takes_weights else None,
    }


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
