"""A prompt as models see it: its images decoded and processed once, whatever the number of completions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from PIL import Image
from torch import Tensor

from r1v_rl.data.chat import prompt_text
from r1v_rl.data.images import load_image
from r1v_rl.models.families import vision_inputs
from r1v_rl.types import Example


@dataclass(slots=True)
class EncodedPrompt:
    """One prompt, ready for the policy and for every rollout engine."""

    example: Example
    text: str
    """The chat template's text, with one placeholder per image."""
    images: list[Image.Image]
    text_ids: list[int]
    """Its token ids, not expanded: what vLLM takes."""
    prompt_ids: list[int]
    """Token ids with one placeholder per visual token: what the policy takes."""
    vision_inputs: dict[str, Tensor]
    """What the model takes of the images (`families.VISION_INPUTS`); empty for a text-only prompt."""
    positions: Tensor | None = None
    """(axes, tokens) of `prompt_ids`, where the model counts other than 0, 1, 2, ... (`families.token_positions`)."""


def encode_prompt(
    processor: Any, example: Example, *, device: Any, template_kwargs: dict | None = None
) -> EncodedPrompt:
    """Render the chat template, decode and process the images once, and move the pixels to `device`."""
    text = prompt_text(processor, example, template_kwargs)
    images = [load_image(source) for source in example.images]
    tokenizer = getattr(processor, "tokenizer", processor)
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not images:
        return EncodedPrompt(example, text, [], text_ids, text_ids, {})
    inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
    prompt_ids = inputs["input_ids"][0].tolist()
    taken = {name: tensor.to(device) for name, tensor in vision_inputs(inputs).items()}
    return EncodedPrompt(example, text, images, text_ids, prompt_ids, taken)


def prompt_encoder(
    processor: Any, *, device: Any, with_vision_inputs: bool, template_kwargs: dict | None = None
) -> Callable[[Example], EncodedPrompt]:
    """`encode_prompt` for one engine; without `vision_inputs` (vLLM processes pictures itself) nearly for nothing.

    What a placeholder becomes follows from its picture's size alone, so that the processor is asked once a size.
    """
    if with_vision_inputs:
        return partial(encode_prompt, processor, device=device, template_kwargs=template_kwargs)
    tokenizer = getattr(processor, "tokenizer", processor)

    @cache
    def of_picture(size: tuple[int, int]) -> list[int]:
        inputs = processor(text=[processor.image_token], images=[Image.new("RGB", size)], add_special_tokens=False)
        return list(inputs["input_ids"][0])

    def encode(example: Example) -> EncodedPrompt:
        text = prompt_text(processor, example, template_kwargs)
        images = [load_image(source) for source in example.images]
        text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not images:
            return EncodedPrompt(example, text, [], text_ids, text_ids, {})
        placeholder, shown = tokenizer.convert_tokens_to_ids(processor.image_token), iter(images)
        expanded = [of_picture(next(shown).size) if token == placeholder else [token] for token in text_ids]
        return EncodedPrompt(example, text, images, text_ids, [token for part in expanded for token in part], {})

    return encode


def placeholder_ids(model_config: Any) -> list[int]:
    """Ids of the tokens that stand for an image or a video: a policy that samples one would end the run."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    ids = {getattr(model_config, name, None) for name in names}
    return sorted(i for i in ids if i is not None)
