"""A vision-language model from its parts: vision encoder, fresh projector, causal language model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r1v_rl.errors import UserError
from r1v_rl.models.encoders import load_vision_encoder, pixel_statistics, vision_config
from r1v_rl.models.image_tokens import add_image_tokens, check_round_trip, image_chat_template
from r1v_rl.models.weight_files import load_weights

LANGUAGE_MODELS = ("qwen2", "qwen3", "llama")
"""Families whose text logits were found to be the same inside the composed model, in transformers and vLLM.

Others scale or cap their logits outside the layers that are taken over."""


def compose_vlm(
    vision_encoder: str | Path | PreTrainedModel,
    language_model: str | Path | PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_image_tiles: int = 1,
    image_size: int | None = None,
    downsample_ratio: float = 0.5,
    dtype: str = "float32",
    seed: int = 0,
) -> InternVLForConditionalGeneration:
    """The composed model, also written to `output_dir` as a folder that transformers and vLLM load.

    Encoder and language model keep their weights; the projector (pixel shuffle, LayerNorm, Linear, GELU, Linear) is new
    and drawn from `seed`. A tokenizer without image tokens gets them; text without images gives the same logits.

    Args:
        vision_encoder: What `encoders.load_vision_encoder` takes: InternViT, the tower of an InternVL, DINOv2.
        language_model: A causal language model of `LANGUAGE_MODELS`, or its folder.
        tokenizer: By default the one in the language model's folder; it must have a chat template.
        max_image_tiles: Tiles that the processor may cut an image into, beside a thumbnail; 1 never cuts.
        image_size: Side of a tile in pixels; by default the encoder's own, 224 for DINOv2.
    """
    encoder = load_vision_encoder(vision_encoder, image_size)
    llm = load_language_model(language_model, dtype)
    tokenizer = tokenizer or load_tokenizer(llm.name_or_path)
    add_image_tokens(tokenizer)
    tiles = image_processor(
        encoder.config.image_size[0], max_image_tiles=max_image_tiles, **pixel_statistics(encoder.name_or_path)
    )
    processor = make_processor(tokenizer, encoder.config, tiles, downsample_ratio)
    model = join_parts(encoder, llm, processor, downsample_ratio, seed, dtype)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return model


def composed_config(
    vision_encoder: Path, language_model: Path, *, max_image_tiles: int = 1, downsample_ratio: float = 0.5
) -> tuple[InternVLConfig, InternVLProcessor]:
    """Configuration and processor of what `compose_vlm` would make of two folders; no weights are read."""
    language_model_type(language_model)
    vision, llm = vision_config(vision_encoder), AutoConfig.from_pretrained(language_model)
    tokenizer = load_tokenizer(str(language_model))
    add_image_tokens(tokenizer)
    tiles = image_processor(
        vision.image_size[0], max_image_tiles=max_image_tiles, **pixel_statistics(str(vision_encoder))
    )
    processor = make_processor(tokenizer, vision, tiles, downsample_ratio)
    llm.vocab_size = max(llm.vocab_size, _rows_wanted(tokenizer))
    return _joined_config(vision, llm, processor, downsample_ratio), processor


def load_language_model(language_model: str | Path | PreTrainedModel, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model that the composed model can hold.

    Raises:
        UserError: If it cannot be read or is of another family than `LANGUAGE_MODELS`.
    """
    language_model_type(language_model)
    if isinstance(language_model, PreTrainedModel):
        return language_model
    return load_weights(AutoModelForCausalLM, language_model, dtype=dtype)


def language_model_type(language_model: str | Path | PreTrainedModel) -> str:
    """The model type of a language model that the composed model can hold; refuses others."""
    if isinstance(language_model, PreTrainedModel):
        kind = language_model.config.model_type
    else:
        try:
            kind = AutoConfig.from_pretrained(language_model).model_type
        except (OSError, ValueError) as error:
            raise UserError(
                f"`language_model` must be a model folder or hub id; {language_model} cannot be read: {error}"
            ) from error
    if kind not in LANGUAGE_MODELS:
        raise UserError(
            f"`language_model` must be one of {', '.join(LANGUAGE_MODELS)}, whose text logits stay the same inside "
            f"InternVL; received a `{kind}`"
        )
    return kind


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the language model's folder."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the language model's folder must hold its tokenizer; {folder}: {error}") from error


def image_processor(image_size: int, *, max_image_tiles: int = 1, **pixel_statistics: Any) -> GotOcr2ImageProcessor:
    """InternVL's image processor: one tile of image_size, or up to max_image_tiles and a thumbnail."""
    return GotOcr2ImageProcessor(
        size={"height": image_size, "width": image_size},
        crop_to_patches=max_image_tiles > 1,
        min_patches=1,
        max_patches=max_image_tiles,
        **pixel_statistics,
    )


def shuffled_features(vision_encoder: nn.Module, pixel_values: Tensor, downsample_ratio: float = 0.5) -> Tensor:
    """What the projector reads: patch features in visual-token order, (tiles, tokens, hidden / ratio^2)."""
    hidden = vision_encoder(pixel_values=pixel_values).last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    grid = hidden.view(hidden.shape[0], side, side, -1)
    # pixel_shuffle is a method that reads no state of its model
    return InternVLModel.pixel_shuffle(None, grid, scale_factor=downsample_ratio).flatten(1, 2)


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision: InternVLVisionConfig,
    tiles: GotOcr2ImageProcessor,
    downsample_ratio: float,
) -> InternVLProcessor:
    """The processor of the composed model; `tokenizer` has its image tokens."""
    (size, _), (patch, _) = vision.image_size, vision.patch_size
    side = size // patch * downsample_ratio
    if size % patch or side != int(side):
        raise UserError(
            f"the encoder's patches a side ({size} px / {patch} px) must be whole, and a multiple of "
            f"{1 / downsample_ratio:g} for `downsample_ratio` {downsample_ratio}"
        )
    pixels = {"image_mean": tiles.image_mean, "image_std": tiles.image_std}
    processor = InternVLProcessor(
        image_processor=tiles,
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": size, "width": size}, **pixels),
        image_seq_length=int(side) ** 2,
        chat_template=image_chat_template(tokenizer),
    )
    check_round_trip(processor)
    return processor


def join_parts(
    encoder: PreTrainedModel,
    llm: PreTrainedModel,
    processor: InternVLProcessor,
    downsample_ratio: float,
    seed: int,
    dtype: str = "float32",
) -> InternVLForConditionalGeneration:
    """The parts in one model, with copies of their weights and a projector drawn from `seed`."""
    _make_room(llm, processor.tokenizer)
    config = _joined_config(
        encoder.config, llm.config, processor, downsample_ratio, dtype=dtype, architecture=type(llm).__name__
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        _init_projector(model.model.multi_modal_projector, llm.get_input_embeddings().weight.float())
    for parameter in model.parameters():  # not `model.to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=llm.generation_config.eos_token_id or processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return model.eval()


def _joined_config(
    vision: Any,
    text: Any,
    processor: InternVLProcessor,
    downsample_ratio: float,
    *,
    dtype: str = "float32",
    architecture: str | None = None,
) -> InternVLConfig:
    # transformers ties the head by the top-level key and vLLM by the text config's: both must say what the parts are
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict() | ({"architectures": [architecture]} if architecture else {}),
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=downsample_ratio,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        dtype=dtype,
    )


def _rows_wanted(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


@torch.no_grad()
def _make_room(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for the image tokens where the tables have none left: the mean of the others, which no text picks."""
    wanted, rows = _rows_wanted(tokenizer), llm.get_input_embeddings().weight.shape[0]
    if wanted <= rows:
        return
    llm.resize_token_embeddings(wanted, mean_resizing=False)
    tables = {module.weight for module in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    for table in tables:
        table[rows:] = table[:rows].float().mean(0)


@torch.no_grad()
def _init_projector(projector: Any, embeddings: Tensor) -> None:
    """Draws the two linear layers so that visual tokens come out at the scale of the word embeddings."""
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    features = torch.randn(256, projector.linear_1.in_features)
    projector.linear_2.weight.mul_(embeddings.pow(2).mean().sqrt() / projector(features).pow(2).mean().sqrt())
