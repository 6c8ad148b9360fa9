"""A rollout engine for the model in a folder, as it stands there: what evaluation answers with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from r1v_rl.data.chat import check_prompt_lengths
from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import placeholder_ids
from r1v_rl.rollout.vllm_inprocess import VllmEngine
from r1v_rl.types import Example


@dataclass
class EngineConfig:
    """How a finished model answers."""

    use_vllm: bool = field(default=True, metadata={"help": "vLLM in this process; false = transformers' `generate`."})
    dtype: str = field(default="float32", metadata={"help": "Weights and arithmetic: float32, or bfloat16 as on GPUs."})
    vllm_kv_cache_memory_bytes: int | None = field(
        default=None, metadata={"help": "KV cache of vLLM in bytes; unset = vLLM's own measure."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of each GPU that vLLM may take: nothing else runs beside it."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model."})


def open_engine(
    folder: str, processor: Any, config: EngineConfig, examples: Sequence[Example], *, max_tokens: int, seed: int
) -> RolloutEngine:
    """An engine with the folder's weights, sized for these prompts and completions of `max_tokens`.

    Raises:
        DataError: Naming the first row that does not fit into the model's context.
    """
    model_config = AutoConfig.from_pretrained(folder)
    eos = _eos_token_ids(folder, processor)
    banned = placeholder_ids(model_config)
    context = model_config.get_text_config().max_position_embeddings
    longest = check_prompt_lengths(examples, processor, max_model_len=context, max_completion_length=max_tokens)
    if config.use_vllm:
        return VllmEngine(
            folder,
            dtype=config.dtype,
            max_model_len=longest + max_tokens,
            banned_token_ids=banned,
            eos_token_ids=eos,
            temperature=1.0,
            max_images=max((len(example.images) for example in examples), default=0),
            seed=seed,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            kv_cache_memory_bytes=config.vllm_kv_cache_memory_bytes,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
        )
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype=config.dtype, device_map=_device()).eval()
    return TransformersEngine(policy, processor.tokenizer, eos_token_ids=eos, banned_token_ids=banned)


def _eos_token_ids(folder: str, processor: Any) -> list[int]:
    try:
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a model need not have one
        ids = None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, processor.tokenizer.eos_token_id] if i is not None})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
