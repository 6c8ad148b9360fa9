"""An example -> the text a model reads, and how many tokens that is with its images."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from PIL import Image

from r1v_rl.data.images import image_size, load_image
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.types import Example

Processor = Any
"""A transformers processor of a vision-language model."""


def load_processor(model_name_or_path: str | None, max_image_tiles: int | None = None) -> Processor:
    """The processor of a model folder or hub id, which reads text and images.

    Raises:
        RecipeError: If the path leads nowhere, or to a model without images.
    """
    from transformers import AutoProcessor  # seconds; `DataConfig` and the loaders do without

    import r1v_rl.data.transposed_tiles  # noqa: F401  (makes its image processor known by name)

    if not model_name_or_path:
        raise RecipeError("the recipe must set `model_name_or_path`: a model folder or a hub id")
    try:
        processor = AutoProcessor.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`model_name_or_path` must be a model folder with its processor, or a hub id; {model_name_or_path} cannot "
            f"be read: {error}"
        ) from error
    if not hasattr(processor, "image_token"):
        raise RecipeError(
            f"`model_name_or_path` must be a vision-language model; {model_name_or_path} has a "
            f"{type(processor).__name__}, which reads no images"
        )
    limit_image_tiles(processor, max_image_tiles)
    return processor


def prompt_text(processor: Processor, example: Example, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The chat template's text up to where the assistant writes, with one placeholder for each of the images.

    Raises:
        DataError: Where the text of the row spells a placeholder out, or the chat template leaves images out.
    """
    text = processor.apply_chat_template(
        example.messages, add_generation_prompt=True, tokenize=False, **(template_kwargs or {})
    )
    num_placeholders = text.count(processor.image_token)
    if num_placeholders != len(example.images):
        raise DataError(
            f"row {example.id}: the chat template writes {num_placeholders} image placeholder(s) "
            f"{processor.image_token!r} for {len(example.images)} image(s); take the placeholder out of the row's "
            f"text, or use a model whose chat template reads image blocks"
        )
    return text


def limit_image_tiles(processor: Processor, max_image_tiles: int | None) -> None:
    """Make the processor cut no image into more tiles (its thumbnail not counted); None leaves it as it is."""
    if max_image_tiles is None:
        return
    image_processor = processor.image_processor
    if not hasattr(image_processor, "max_patches"):
        raise RecipeError(
            f"`max_image_tiles` is for processors that cut images into tiles, which {type(image_processor).__name__} "
            f"does not; leave it unset"
        )
    image_processor.max_patches = max_image_tiles
    image_processor.min_patches = min(image_processor.min_patches, max_image_tiles)


def count_prompt_tokens(
    processor: Processor, example: Example, template_kwargs: Mapping[str, Any] | None = None
) -> int:
    """Tokens of the prompt with its images processed in full: exact for every processor, and slow."""
    text = prompt_text(processor, example, template_kwargs)
    images = [load_image(source) for source in example.images] or None
    return len(processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0])


def prompt_token_counter(
    processor: Processor, template_kwargs: Mapping[str, Any] | None = None
) -> Callable[[Example], int]:
    """A fast `count_prompt_tokens`.

    The number of visual tokens depends on an image's size alone, so it is asked for once a size. The processor's own
    arithmetic is used where its first answer equals the real thing; else a blank picture of each size is processed.
    """
    tokens_by_size: dict[tuple[int, int], int] = {}
    is_trusted: bool | None = None

    def count(example: Example) -> int:
        nonlocal is_trusted
        text = prompt_text(processor, example, template_kwargs)
        text_ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        sizes = [image_size(source) for source in example.images]
        if sizes and is_trusted is None:
            is_trusted = _predicted_tokens(processor, sizes[0]) == _processed_tokens(processor, sizes[0])
        for size in sizes:
            if size not in tokens_by_size:
                predicted = _predicted_tokens(processor, size) if is_trusted else None
                tokens_by_size[size] = _processed_tokens(processor, size) if predicted is None else predicted
        return len(text_ids) + sum(tokens_by_size[size] - 1 for size in sizes)

    return count


def check_prompt_lengths(
    examples: Iterable[Example],
    processor: Processor,
    *,
    max_model_len: int,
    max_completion_length: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Tokens of the longest prompt, visual ones included.

    Raises:
        DataError: Naming the first row whose prompt and a completion of full length do not fit into the context.
    """
    count = prompt_token_counter(processor, template_kwargs)
    longest = 0
    for example in examples:
        num_tokens = count(example)
        if num_tokens + max_completion_length > max_model_len:
            images = f", {len(example.images)} image(s) included," if example.images else ""
            raise DataError(
                f"row {example.id}: its prompt has {num_tokens} tokens{images} and `max_completion_length` is "
                f"{max_completion_length}: together above the context of {max_model_len}; shorten the row or lower "
                f"`max_completion_length`" + (" or `max_image_tiles`" if example.images else "")
            )
        longest = max(longest, num_tokens)
    return longest


def _predicted_tokens(processor: Processor, size: tuple[int, int]) -> int | None:
    """By the processor's own arithmetic, where it has one."""
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return None
    width, height = size
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]


def _processed_tokens(processor: Processor, size: tuple[int, int]) -> int:
    """Tokens that one placeholder becomes beside a blank picture of this size."""
    text = processor.image_token
    inputs = processor(text=[text], images=[Image.new("RGB", size)], add_special_tokens=False)
    return len(inputs["input_ids"][0])
