"""A rollout engine for a model folder, where nothing trains beside it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import placeholder_ids


@contextmanager
def standalone_engine(
    model: str, processor: Any, *, use_vllm: bool, dtype: str, max_model_len: int, max_images: int, **vllm: Any
) -> Iterator[RolloutEngine]:
    """The engine for the weights in a folder (or of a hub id); a folder is read, never written to.

    Args:
        processor: The one that prompts are encoded with; vLLM is made to read pictures as it does.
        dtype: `float32`, `bfloat16`, ...
        max_images: Most images in one prompt.
        vllm: Further arguments of `VllmEngine`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    banned = placeholder_ids(AutoConfig.from_pretrained(model))
    eos = _eos_token_ids(model, tokenizer)
    if not use_vllm:
        policy = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        yield TransformersEngine(policy, tokenizer, eos_token_ids=eos, banned_token_ids=banned)
        return
    from r1v_rl.rollout.vllm_inprocess import VllmEngine

    with _folder_with(processor, model) as folder:
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


def _eos_token_ids(model: str, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and the model's own where it names some."""
    try:
        named = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        named = AutoConfig.from_pretrained(model).get_text_config().eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None})


@contextmanager
def _folder_with(processor: Any, model: str) -> Iterator[str]:
    """What vLLM reads: the model's folder, or one of links beside this processor, where its pictures differ."""
    theirs = AutoProcessor.from_pretrained(model)
    if theirs.image_processor.to_dict() == processor.image_processor.to_dict():
        yield model
        return
    source = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in source.iterdir():
            if path.is_file() and not Path(folder, path.name).exists():
                Path(folder, path.name).symlink_to(path.resolve())
        yield folder
