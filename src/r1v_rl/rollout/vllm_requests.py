"""What vLLM is told and what it says, the same in this process and behind a server."""

from collections.abc import Sequence
from typing import Any

from r1v_rl.errors import UserError
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion

CACHE_RESETS = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
"""To be called after new weights, all of them: with one left out, features are looked up that are no longer there, or
prefixes of older weights are used. vLLM's engine has them as methods, its server as paths."""

BATCHED_TOKENS = 16384
"""Also vLLM's budget for image features: less would encode one picture of many tiles at a time."""
_BAN = -100.0  # added to a logit: the token is never drawn, and reported log-probabilities stay the raw ones


def logprobs_mode(temperature: float) -> str:
    """How vLLM must report log-probabilities so that they are the policy's at this temperature."""
    return "raw_logprobs" if temperature in (0.0, 1.0) else "processed_logprobs"


def engine_options(
    *,
    dtype: str,
    max_model_len: int,
    seed: int,
    temperature: float,
    max_images: int,
    gpu_memory_utilization: float,
    kv_cache_memory_bytes: int | None,
    tensor_parallel_size: int,
    on_cpu: bool,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, and with dashes those of its server."""
    return {
        "dtype": dtype,
        "load_format": "safetensors",  # else a folder without them has its pickles opened
        "max_model_len": max_model_len,
        "seed": seed,
        "enforce_eager": on_cpu,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "tensor_parallel_size": tensor_parallel_size,
        "limit_mm_per_prompt": {"image": max_images} if max_images else None,
        "logprobs_mode": logprobs_mode(temperature),
        "max_num_batched_tokens": BATCHED_TOKENS,
    }


def sampling_parameters(
    sampling: Sampling, max_tokens: int, repetition_penalty: float, banned: Sequence[int]
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams`, for one prompt."""
    return {
        "n": sampling.num_generations,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": repetition_penalty,
        "logprobs": 0,
        "detokenize": False,  # token by token it costs more than the tiny model itself
        "logit_bias": dict.fromkeys(banned, _BAN) or None,
        **sampling.extra,
    }


def check_prompt(prompt: EncodedPrompt, read: Sequence[int], begun: Sequence[int] = ()) -> None:
    """Raises UserError where vLLM read other tokens than the policy will; `begun` is of a completion to continue."""
    ids = [*prompt.prompt_ids, *begun]
    if list(read) != ids:
        raise UserError(
            f"row {prompt.example.id}: vLLM reads the prompt as {len(read)} tokens, the policy as {len(ids)}: the "
            "processor in the model folder differs from the one in use"
        )


def completion(
    tokenizer: Any, eos: set[int], token_ids: list[int], logprobs: list[float], weight_version: int | None
) -> Completion:
    """One sample of vLLM's, decoded."""
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        is_truncated=not token_ids or token_ids[-1] not in eos,
        weight_version=weight_version,
    )
