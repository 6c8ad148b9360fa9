"""`r1v-rl compose`, `transfer` and `convert`: models made of others without training, each in a stage folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1v_rl.config import build_configs, dump_recipe, read_recipe
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tracking.manifest import RUN_MANIFEST, write_run_manifest

_OUTPUT_HELP = "Folder for the model, its processor, config.yaml and manifest.json."
_DTYPE = {"help": "Type of the weights that are written.", "choices": ["float32", "bfloat16", "float16"]}


@dataclass
class ComposeConfig:
    """The parts of a new vision-language model."""

    vision_encoder: str = field(
        metadata={"help": "InternViT, the tower of a whole InternVL, or DINOv2: a folder, a hub id, or a shipped part."}
    )
    language_model: str = field(
        metadata={"help": "A Qwen2, Qwen3 or Llama with its tokenizer: a folder, a hub id, or a shipped part."}
    )
    output_dir: str = field(metadata={"help": _OUTPUT_HELP})
    max_image_tiles: int = field(
        default=1, metadata={"help": "Tiles an image may be cut into, beside a thumbnail; 1 never cuts."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of a tile in pixels; unset, the encoder's own, and 224 for DINOv2."}
    )
    downsample_ratio: float = field(
        default=0.5, metadata={"help": "Pixel shuffle: 0.5 makes one visual token of two by two patches."}
    )
    dtype: str = field(default="float32", metadata=_DTYPE)
    seed: int = field(default=0, metadata={"help": "Seed of the new projector."})

    def __post_init__(self) -> None:
        if self.max_image_tiles < 1:
            raise RecipeError(f"max_image_tiles must be at least 1, received {self.max_image_tiles}")
        if not 0 < self.downsample_ratio <= 1:
            raise RecipeError(f"downsample_ratio must be above 0 and at most 1, received {self.downsample_ratio}")


@dataclass
class TransferConfig:
    """A trained projector and the language model that it moves to."""

    projector_from: str = field(
        metadata={"help": "Folder of the model whose projector was trained with a substitute language model."}
    )
    language_model: str = field(
        metadata={"help": "The reasoning language model, with its tokenizer and chat template: folder, hub id, part."}
    )
    output_dir: str = field(metadata={"help": _OUTPUT_HELP})
    dtype: str = field(default="float32", metadata=_DTYPE)


@dataclass
class ConvertConfig:
    """A checkpoint and the layout that it is to have."""

    model_name_or_path: str = field(
        metadata={"help": "Folder in the layout `internvl_chat` (Skywork R1V, InternVL) or in transformers'."}
    )
    output_dir: str = field(metadata={"help": _OUTPUT_HELP})
    to: str | None = field(
        default=None,
        metadata={"help": "Layout to write; unset, the other one.", "choices": ["transformers", "internvl_chat"]},
    )
    original: str | None = field(
        default=None,
        metadata={
            "help": "On the way to internvl_chat: the published checkpoint whose config.json, tokenizer and code files "
            "are taken over; unset, they are written anew."
        },
    )


COMPOSE_CONFIGS = (ComposeConfig,)
TRANSFER_CONFIGS = (TransferConfig,)
CONVERT_CONFIGS = (ConvertConfig,)


def compose_main(argv: Sequence[str]) -> int:
    """Exit code 0 when the composed model stands in `output_dir`."""
    values = read_recipe(COMPOSE_CONFIGS, argv, prog="r1v-rl compose")
    (config,) = build_configs(COMPOSE_CONFIGS, values)
    encoder, llm = resolve_part(config.vision_encoder), resolve_part(config.language_model)
    output_dir = _begin(config.output_dir, encoder, llm)
    from r1v_rl.models.compose import compose_vlm
    from r1v_rl.models.parts import part_hashes

    model = compose_vlm(
        encoder,
        llm,
        output_dir,
        max_image_tiles=config.max_image_tiles,
        image_size=config.image_size,
        downsample_ratio=config.downsample_ratio,
        dtype=config.dtype,
        seed=config.seed,
    )
    sizes = {"parameters": _parameters(model), "visual_tokens_per_tile": model.config.image_seq_length}
    _finish(output_dir, "compose", None, values, part_hashes(model), {"seed": config.seed}, sizes)
    print(f"{output_dir}: {sizes['visual_tokens_per_tile']} visual tokens a tile, parameters {sizes['parameters']}")
    return 0


def transfer_main(argv: Sequence[str]) -> int:
    """Exit code 0 when the re-assembled model stands in `output_dir`."""
    values = read_recipe(TRANSFER_CONFIGS, argv, prog="r1v-rl transfer")
    (config,) = build_configs(TRANSFER_CONFIGS, values)
    llm = resolve_part(config.language_model)
    output_dir = _begin(config.output_dir, config.projector_from, llm)
    from r1v_rl.models.parts import part_hashes
    from r1v_rl.models.transfer import transfer_projector

    transfer = transfer_projector(config.projector_from, llm, output_dir, dtype=config.dtype)
    print(transfer.report(), flush=True)
    metrics = {
        "changed": {name: {"before": old, "after": new} for name, (old, new) in transfer.changed.items()},
        "kept": transfer.kept,
        "embedding_cosine": transfer.embedding_cosine,
        "warnings": transfer.warnings,
    }
    _finish(output_dir, "transfer", config.projector_from, values, part_hashes(transfer.model), {}, metrics)
    return 0


def convert_main(argv: Sequence[str]) -> int:
    """Exit code 0 when the checkpoint stands in `output_dir` in the other layout."""
    values = read_recipe(CONVERT_CONFIGS, argv, prog="r1v-rl convert")
    (config,) = build_configs(CONVERT_CONFIGS, values)
    output_dir = _begin(config.output_dir, config.model_name_or_path, config.original or "")
    from r1v_rl.models.convert import convert_checkpoint

    done = convert_checkpoint(config.model_name_or_path, output_dir, to=config.to, original=config.original)
    counts = {"ps_version": done.ps_version, "tensors": done.num_tensors, "shards": done.num_shards}
    _finish(output_dir, "convert", config.model_name_or_path, values, done.weight_hashes, {}, counts)
    print(f"{output_dir}: {done.num_tensors} tensors in {done.num_shards} file(s), layout {done.layout}")
    return 0


def _begin(output_dir: str, *sources: str | Path) -> Path:
    """The folder, without a manifest: it counts as complete only when the new one is written."""
    folder = Path(output_dir)
    for source in sources:
        if source and folder.exists() and Path(source).exists() and folder.samefile(source):
            raise UserError(f"`output_dir` must not be a folder that is read from, received {output_dir} for both")
    (folder / RUN_MANIFEST).unlink(missing_ok=True)
    return folder


def _finish(
    output_dir: Path, stage: str, parent: str | None, values: dict, hashes: dict, seeds: dict, metrics: dict
) -> None:
    (output_dir / "config.yaml").write_text(dump_recipe(values))
    write_run_manifest(
        output_dir,
        stage=stage,
        parent=parent,
        config=values,
        data_hash=None,
        weight_hashes=hashes,
        seeds=seeds,
        metrics=metrics,
    )


def _parameters(model: Any) -> dict[str, int]:
    from r1v_rl.models.parts import PARTS, part_of

    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    return sizes
