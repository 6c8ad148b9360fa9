"""Tiny models of the other families with random weights, each with a real processor of its own; no hub."""

from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from r1v_rl.tiny.tokenizer import REASONING_TEMPLATE, build_tokenizer

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
_PATCH = 8
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def random_family(family: str, seed: int = 0, *, text_class: Any = LlamaConfig, **text: Any):
    """(model, processor): width 64, head size 32, 2 + 2 layers, float32.

    Pictures of 32 x 32 are 4 visual tokens (Qwen) or 16 (LLaVA); those of another size are as many as the family makes
    of them. `text` are settings of the language model; LLaVA's may be of another class too.
    """
    torch.manual_seed(seed)
    model, processor = _qwen(family, text) if family.startswith("qwen") else _llava(family, text_class, text)
    with torch.no_grad():  # far enough from uniform that positions, images and prompts matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float(), processor


def save_random_family(folder: Path, family: str, seed: int = 0, **text: Any) -> Path:
    """The same as a folder that transformers and vLLM load."""
    model, processor = random_family(family, seed, **text)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(special: list[str], image: str):
    tokenizer = build_tokenizer(REASONING_TEMPLATE.replace("<IMG_CONTEXT>", image))
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def _text_settings(tokenizer, text: dict) -> dict:
    return {
        **_TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **text,
    }  # fmt: skip


def _llava(family: str, text_class: Any, text: dict):
    tokenizer = _tokenizer(["<image>"], "<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=_PATCH, projection_dim=32,
    )  # fmt: skip
    parts = {
        "vision_config": vision,
        "text_config": text_class(**_text_settings(tokenizer, text)),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    reading = {
        "patch_size": _PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        "chat_template": tokenizer.chat_template,
    }  # fmt: skip
    if family == "llava":
        config = LlavaConfig(**parts, image_seq_length=16)
        return LlavaForConditionalGeneration(config), LlavaProcessor(CLIPImageProcessor(**size), tokenizer, **reading)
    grid = [[32, 64], [64, 32], [32, 96]]
    config = LlavaNextConfig(**parts, image_grid_pinpoints=grid)
    images = LlavaNextImageProcessor(**size, image_grid_pinpoints=grid)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(images, tokenizer, **reading)


def _qwen(family: str, text: dict):
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special, "<|vision_start|><|image_pad|><|vision_end|>")
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in special)
    ids = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
    }  # fmt: skip
    settings = _text_settings(tokenizer, text)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": _PATCH,
    }  # fmt: skip
    pixels = {"patch_size": _PATCH, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    template = tokenizer.chat_template
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
        config = Qwen2_5_VLConfig(
            vision_config={**vision, "window_size": 32, "fullatt_block_indexes": [1]},
            text_config={**settings, "rope_parameters": rope}, tie_word_embeddings=settings["tie_word_embeddings"],
            **ids,
        )  # fmt: skip
        videos = Qwen2VLVideoProcessor(**pixels)
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**pixels), tokenizer, videos, chat_template=template)
        return Qwen2_5_VLForConditionalGeneration(config), processor
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True, "rope_theta": 1e4}
    config = Qwen3VLConfig(
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        text_config={**settings, "head_dim": 32, "rope_parameters": rope},
        tie_word_embeddings=settings["tie_word_embeddings"], **ids,
    )  # fmt: skip
    videos = Qwen3VLVideoProcessor(**pixels)
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(**pixels), tokenizer, videos, chat_template=template)
    return Qwen3VLForConditionalGeneration(config), processor
