"""A tiny InternVL with random weights, its processor, and pictures of several tile counts."""

from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (prepares a spawned process before torchvision is imported)
import torch
from PIL import Image
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from r1v_rl.models.compose import image_processor
from r1v_rl.tiny.tokenizer import build_tokenizer

TILE = 32
_PATCH = 8


def random_vlm(seed: int = 0, *, max_tiles: int = 3, dropout: float = 0.0, text_config_class=Qwen2Config):
    """(model, processor): width 64, head size 32, 2 + 2 layers, 4 visual tokens a tile, float32."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[TILE, TILE],
        patch_size=[_PATCH, _PATCH], use_qk_norm=False, hidden_dropout_prob=0.0, attention_dropout=0.0,
    )  # fmt: skip
    text = text_config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False, attention_dropout=dropout,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.context_image_token_id,
        image_seq_length=(TILE // _PATCH // 2) ** 2, tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config).float()
    with torch.no_grad():  # far enough from uniform that positions, images and prompts matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = InternVLProcessor(
        image_processor(TILE, max_image_tiles=max_tiles),
        tokenizer,
        _video_processor(),
        image_seq_length=config.image_seq_length,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def save_random_vlm(folder: Path, seed: int = 0, **settings) -> Path:
    """The same as a folder that transformers and vLLM load."""
    model, processor = random_vlm(seed, **settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = TILE, height: int = TILE) -> Image.Image:
    """Noise: every picture is another one."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _video_processor():
    from transformers import InternVLVideoProcessor

    return InternVLVideoProcessor(size={"height": TILE, "width": TILE})
