"""A vision-language model from its parts: vision encoder, fresh projector, causal language model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r1v_rl.errors import UserError

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""What InternVL's processor asks of a tokenizer, and how it is written in one that has none of its own."""


def compose_vlm(
    vision_encoder: str | Path | PreTrainedModel,
    language_model: str | Path | PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_image_tiles: int = 1,
    downsample_ratio: float = 0.5,
    seed: int = 0,
) -> InternVLForConditionalGeneration:
    """The composed model, also written to `output_dir` as a folder that transformers and vLLM load.

    Encoder and language model keep their weights; the projector (pixel shuffle, LayerNorm, Linear, GELU, Linear) is new
    and drawn from `seed`. A tokenizer without image tokens gets them; text without images gives the same logits.

    Args:
        vision_encoder: An `InternVLVisionModel` or its folder.
        language_model: A causal language model or its folder.
        tokenizer: By default the one in the language model's folder; it must have a chat template.
        max_image_tiles: Tiles that the processor may cut an image into, beside a thumbnail; 1 never cuts.
    """
    encoder = (
        vision_encoder
        if isinstance(vision_encoder, PreTrainedModel)
        else InternVLVisionModel.from_pretrained(vision_encoder)
    )
    llm = (
        language_model
        if isinstance(language_model, PreTrainedModel)
        else AutoModelForCausalLM.from_pretrained(language_model, dtype="float32")
    )
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(llm.name_or_path)
    if not tokenizer.chat_template:
        raise UserError(
            f"the language model's tokenizer must have a chat template; `{llm.name_or_path}` has none "
            f"(put a chat_template.jinja into its folder)"
        )
    _add_image_tokens(tokenizer, llm)
    processor = _processor(tokenizer, encoder, max_image_tiles, downsample_ratio)
    model = _join(encoder, llm, processor, downsample_ratio, seed)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return model


def image_processor(image_size: int, *, max_image_tiles: int = 1) -> GotOcr2ImageProcessor:
    """InternVL's image processor: one tile of image_size, or up to max_image_tiles and a thumbnail."""
    return GotOcr2ImageProcessor(
        size={"height": image_size, "width": image_size},
        crop_to_patches=max_image_tiles > 1,
        min_patches=1,
        max_patches=max_image_tiles,
    )


def shuffled_features(vision_encoder: nn.Module, pixel_values: Tensor, downsample_ratio: float = 0.5) -> Tensor:
    """What the projector reads: patch features in visual-token order, (tiles, tokens, hidden / ratio^2)."""
    hidden = vision_encoder(pixel_values=pixel_values).last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    grid = hidden.view(hidden.shape[0], side, side, -1)
    # pixel_shuffle is a method that reads no state of its model
    return InternVLModel.pixel_shuffle(None, grid, scale_factor=downsample_ratio).flatten(1, 2)


def _add_image_tokens(tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel) -> None:
    """Where the tokenizer has no image tokens: adds them, and rows for them where the embedding has none left."""
    if getattr(tokenizer, "context_image_token", None):
        return
    tokenizer.add_special_tokens({"extra_special_tokens": IMAGE_TOKENS}, replace_extra_special_tokens=False)
    for name, token in IMAGE_TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    if len(tokenizer) > llm.get_input_embeddings().weight.shape[0]:
        llm.resize_token_embeddings(len(tokenizer))


def _processor(
    tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, max_image_tiles: int, downsample_ratio: float
) -> InternVLProcessor:
    (size, _), (patch, _) = encoder.config.image_size, encoder.config.patch_size
    side = size // patch * downsample_ratio
    if size % patch or side != int(side):
        raise UserError(
            f"the encoder's patches a side ({size} px / {patch} px) must be whole, and a multiple of "
            f"{1 / downsample_ratio:g} for `downsample_ratio` {downsample_ratio}"
        )
    return InternVLProcessor(
        image_processor=image_processor(size, max_image_tiles=max_image_tiles),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": size, "width": size}),
        image_seq_length=int(side) ** 2,
        chat_template=tokenizer.chat_template,
    )


def _join(
    encoder: PreTrainedModel,
    llm: PreTrainedModel,
    processor: InternVLProcessor,
    downsample_ratio: float,
    seed: int,
) -> InternVLForConditionalGeneration:
    # transformers ties the head by the top-level key and vLLM by the text config's: both must say what the parts are
    tied = bool(llm.config.tie_word_embeddings)
    config = InternVLConfig(
        vision_config=encoder.config.to_dict(),
        text_config=llm.config.to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=downsample_ratio,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        _init_projector(model.model.multi_modal_projector, llm.get_input_embeddings().weight)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    if not tied:
        model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=llm.generation_config.eos_token_id or processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return model.eval()


@torch.no_grad()
def _init_projector(projector: Any, embeddings: Tensor) -> None:
    """Draws the two linear layers so that visual tokens come out at the scale of the word embeddings."""
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    features = torch.randn(256, projector.linear_1.in_features)
    projector.linear_2.weight.mul_(embeddings.pow(2).mean().sqrt() / projector(features).pow(2).mean().sqrt())
