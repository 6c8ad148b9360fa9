"""A rollout engine for a model folder, where nothing trains beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from r1v_rl.models.weight_files import check_safetensors, load_weights
from r1v_rl.rollout.engine import StreamingEngine
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.model_folder import end_token_ids, folder_with
from r1v_rl.rollout.prompts import placeholder_ids


@contextmanager
def standalone_engine(
    model: str,
    processor: Any,
    *,
    use_vllm: bool,
    dtype: str,
    max_model_len: int,
    max_images: int,
    device_map: str | None = None,
    **vllm: Any,
) -> Iterator[StreamingEngine]:
    """The engine for the weights in a folder (or of a hub id); a folder is read, never written to.

    Args:
        processor: The one that prompts are encoded with; vLLM is made to read pictures as it does.
        dtype: `float32`, `bfloat16`, ...
        max_images: Most images in one prompt.
        device_map: How accelerate spreads the weights over devices, without vLLM; None = all on the first GPU, or CPU.
        vllm: Further arguments of `VllmEngine`.
    """
    check_safetensors(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    banned = placeholder_ids(AutoConfig.from_pretrained(model))
    eos = end_token_ids(_named_end(model), tokenizer)
    if not use_vllm:
        policy = load_weights(AutoModelForImageTextToText, model, dtype=dtype, device_map=device_map)
        if device_map is None:
            policy.to("cuda" if torch.cuda.is_available() else "cpu")
        policy.eval()
        yield TransformersEngine(policy, tokenizer, eos_token_ids=eos, banned_token_ids=banned)
        return
    from r1v_rl.rollout.vllm_inprocess import VllmEngine

    with folder_with(processor, model) as folder:
        yield VllmEngine(
            folder,
            dtype=dtype,
            max_model_len=max_model_len,
            banned_token_ids=banned,
            eos_token_ids=eos,
            temperature=1.0,  # only log-probabilities depend on it
            max_images=max_images,
            **vllm,
        )


def _named_end(model: str) -> int | list[int] | None:
    """The end tokens that the model names."""
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        return AutoConfig.from_pretrained(model).get_text_config().eos_token_id
