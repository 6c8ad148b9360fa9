"""The folder that vLLM reads a model from, and the tokens that end its completions."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from r1v_rl.data.chat import load_processor


@contextmanager
def folder_with(processor: Any, source: str, save: Callable[[str], Any] | None = None) -> Iterator[str]:
    """The model's own folder, or one beside it where its processor is not the one in use (`max_image_tiles`).

    Large files are linked, not copied, and the model's folder is not touched.

    Args:
        processor: The one that prompts are encoded with.
        source: Folder or hub id of the model; empty where none holds it, and `save` writes it.
        save: Writes the model into a folder.
    """
    if Path(source).is_absolute() and not Path(source).is_dir():
        source = ""  # it was loaded from a folder that is gone
    if source and _same_images(processor, load_processor(source)):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        if source:
            for path in Path(source if Path(source).is_dir() else snapshot_download(source)).iterdir():
                if path.is_file() and not Path(folder, path.name).exists():
                    Path(folder, path.name).symlink_to(path.resolve())
        elif save is not None:
            save(folder)
        yield folder


def end_token_ids(named: int | list[int] | None, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: those that the model names and the tokenizer's own."""
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None})


def saved_dtype(model: str) -> str:
    """That of the weights in a model folder (or of a hub id); vLLM's `auto` would halve float32."""
    config = AutoConfig.from_pretrained(model)
    return str(config.dtype or config.get_text_config().dtype or "float32").removeprefix("torch.")


def _same_images(processor: Any, other: Any) -> bool:
    """Whether both cut and scale pictures alike."""
    return processor.image_processor.to_dict() == other.image_processor.to_dict()
