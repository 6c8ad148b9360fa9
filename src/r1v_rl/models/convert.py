"""Checkpoints between the published `internvl_chat` layout (Skywork R1V, InternVL) and transformers', both ways.

Every tensor of either side is accounted for before anything is written; then the weights stream through, one shard of
the source after the other, bit by bit as they are.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from r1v_rl.checkpoints import PICKLE_SUFFIXES
from r1v_rl.data.transposed_tiles import TransposedTilesImageProcessor
from r1v_rl.errors import UserError
from r1v_rl.models import chat_config, chat_keys
from r1v_rl.models.chat_keys import WeightStep
from r1v_rl.models.compose import image_processor, make_processor
from r1v_rl.models.image_tokens import IMAGE_TOKENS, add_image_tokens
from r1v_rl.models.parts import PARTS, part_of
from r1v_rl.models.weight_files import OpenWeights, ShardWriter, WeightFiles
from r1v_rl.state_files import combined_hash, tensor_hash

TRANSFORMERS, CHAT = "transformers", "internvl_chat"
LAYOUTS = (TRANSFORMERS, CHAT)
_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLE_SUFFIXES)
_VISION, _PIXELS = "vision_model.", "preprocessor_config.json"
_STAGE_FILES = ("manifest.json", "config.yaml")


@dataclass
class Conversion:
    """What was written."""

    layout: str
    ps_version: str
    num_tensors: int
    num_shards: int
    weight_hashes: dict[str, str]
    """Hash of each part; in transformers' layout it is what `parts.part_hashes` says of the loaded model."""


def convert_checkpoint(
    source: str | Path, output_dir: str | Path, *, to: str | None = None, original: str | Path | None = None
) -> Conversion:
    """The checkpoint in the other layout, in `output_dir`.

    Args:
        to: `transformers` or `internvl_chat`; by default the one that the source is not in.
        original: On the way to `internvl_chat`, the published checkpoint whose configuration, tokenizer and code files
            are taken over. Without it they are written anew from the model's own.

    Raises:
        UserError: Listing the weights that are missing, left over or of another shape; or if the model does what the
            other layout cannot.
    """
    config = _read_config(source)
    found = CHAT if chat_config.is_chat_config(config) else TRANSFORMERS
    to = to or LAYOUTS[1 - LAYOUTS.index(found)]
    if to not in LAYOUTS:
        raise UserError(f"`to` must be one of {', '.join(LAYOUTS)}, received {to!r}")
    if to == found:
        raise UserError(f"{source} is in the layout `{to}` already (model_type {config.get('model_type')!r})")
    if Path(output_dir).exists() and Path(output_dir).samefile(source):
        raise UserError(f"`output_dir` must not be the folder that is read from, received {output_dir} for both")
    if original is not None and to == TRANSFORMERS:
        raise UserError("`original` is for the way back to internvl_chat; leave it unset")
    if to == CHAT:
        return _to_chat(Path(source), Path(output_dir), original)
    is_encoder = config["model_type"] == chat_config.VISION_TYPE
    convert = _vision_to_transformers if is_encoder else _to_transformers
    return convert(Path(source), Path(output_dir), config)


def _to_transformers(source: Path, output_dir: Path, chat: dict[str, Any]) -> Conversion:
    files, version = WeightFiles(source), chat_config.ps_version(chat)
    tokenizer = _chat_tokenizer(source)
    config = chat_config.transformers_config(chat, tokenizer.context_image_token_id)
    processor = _processor(tokenizer, chat, config, version)
    shapes = _model_shapes(config)
    expected = {step.name: step.shape for step in chat_keys.steps_to_chat(shapes)[0]}
    _check(source, expected, files.shapes, _optional(config))
    steps = [step for step in chat_keys.steps_to_transformers(shapes) if step.sources[0] in files.shapes]
    _check_tied_head(files, config)
    arrange = _arrangement(version, config)

    def make(step: WeightStep, weights: OpenWeights) -> Tensor:
        tensor = arrange(step.sources[0], weights[step.sources[0]])
        return tensor if step.part is None else tensor.chunk(3)[step.part].clone()

    hashes, num_shards = _stream(files, steps, output_dir, make)
    config.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    _write_generation_config(source, output_dir, tokenizer)
    in_memory = {chat_keys.memory_name(name): value for name, value in hashes.items()}
    if config.tie_word_embeddings:
        in_memory["lm_head.weight"] = in_memory["model.language_model.embed_tokens.weight"]
    return Conversion(TRANSFORMERS, version, len(hashes), num_shards, _part_hashes(in_memory))


def _vision_to_transformers(source: Path, output_dir: Path, published: dict[str, Any]) -> Conversion:
    """A vision encoder alone: the names are those inside the whole model, without the prefix."""
    files, config = WeightFiles(source), chat_config.vision_config(published)
    with torch.device("meta"):
        state = InternVLVisionModel(config).state_dict()
    shapes = {f"vision_tower.{name}": tuple(weight.shape) for name, weight in state.items()}
    expected = {step.name.removeprefix(_VISION): step.shape for step in chat_keys.steps_to_chat(shapes)[0]}
    _check(source, expected, files.shapes)
    steps = chat_keys.steps_to_transformers(shapes)
    for step in steps:
        step.name, step.sources = step.name.removeprefix("vision_tower."), [step.sources[0].removeprefix(_VISION)]

    def make(step: WeightStep, weights: OpenWeights) -> Tensor:
        tensor = weights[step.sources[0]]
        return tensor if step.part is None else tensor.chunk(3)[step.part].clone()

    hashes, num_shards = _stream(files, steps, output_dir, make)
    config.save_pretrained(output_dir)
    if (source / _PIXELS).exists():
        shutil.copyfile(source / _PIXELS, output_dir / _PIXELS)
    in_memory = {"vision_encoder": combined_hash({f"model.vision_tower.{name}": h for name, h in hashes.items()})}
    return Conversion(TRANSFORMERS, "v2", len(hashes), num_shards, in_memory)


def _to_chat(source: Path, output_dir: Path, original: str | Path | None) -> Conversion:
    config, files = InternVLConfig.from_pretrained(source), WeightFiles(source)
    processor = _load_processor(source)
    tiles = processor.image_processor
    version = "v1" if isinstance(tiles, TransposedTilesImageProcessor) else "v2"
    if (list(tiles.image_mean), list(tiles.image_std)) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        raise UserError(
            f"internvl_chat's code normalises pixels with ImageNet's mean and deviation, and {source} was trained with "
            f"{list(tiles.image_mean)}, {list(tiles.image_std)}"
        )
    shapes = _model_shapes(config)
    if original is None:
        described = chat_config.chat_config(config, tiles=tiles.to_dict(), version=version)
    else:
        described = _original_config(Path(original), config, version)
    steps, homeless = chat_keys.steps_to_chat(shapes)
    if homeless:
        raise UserError(_listed(f"internvl_chat has no place for weights of {source}", {"without a place": homeless}))
    stored = {chat_keys.disk_name(name): name for name in files.file_of}
    _check(source, shapes, {disk: files.shapes[name] for disk, name in stored.items()}, _optional(config))
    steps = [step for step in steps if step.sources[0] in stored]
    for step in steps:
        step.sources = [stored[name] for name in step.sources]
    _check_tied_head(files, config)
    arrange = _arrangement(version, config)

    def make(step: WeightStep, weights: OpenWeights) -> Tensor:
        parts = [weights[name] for name in step.sources]
        return arrange(step.name, parts[0] if len(parts) == 1 else torch.cat(parts))

    hashes, num_shards = _stream(files, steps, output_dir, make)
    if original is None:
        processor.tokenizer.save_pretrained(output_dir)
        _write_generation_config(source, output_dir, processor.tokenizer)
    else:
        _copy_all_but_weights(Path(original), output_dir)
    (output_dir / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return Conversion(CHAT, version, len(hashes), num_shards, _part_hashes(hashes))


# ---- weights --------------------------------------------------------------------------------------------------------


def _stream(
    files: WeightFiles, steps: list[WeightStep], output_dir: Path, make: Callable[[WeightStep, OpenWeights], Tensor]
) -> tuple[dict[str, str], int]:
    """Writes one shard for each file of the source; (hash of each tensor by name, number of shards)."""
    shards: dict[str, list[WeightStep]] = {}
    for step in steps:
        shards.setdefault(files.file_of[step.sources[0]], []).append(step)
    output_dir.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(output_dir, len(shards))
    hashes: dict[str, str] = {}
    for file in tqdm(sorted(shards), desc="shards"):
        with files.open() as weights:
            tensors = {step.name: make(step, weights).contiguous() for step in shards[file]}
            hashes |= {name: tensor_hash(tensor) for name, tensor in tensors.items()}
            writer.write(tensors)
    writer.finish()
    return hashes, len(shards)


def _check(
    source: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Every weight is there, no other one is, and each has the shape that the configuration says."""
    problems = {
        "missing": sorted(expected.keys() - found.keys() - set(optional)),
        "left over": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name}: {list(found[name])} instead of {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if any(problems.values()):
        raise UserError(_listed(f"the weights of {source} are not those that its config.json describes", problems))


def _optional(config: InternVLConfig) -> list[str]:
    """A head that is tied to the embedding may be stored or not."""
    return [_HEAD] if config.tie_word_embeddings else []


def _listed(what: str, problems: Mapping[str, list[str]]) -> str:
    lines = [what]
    for kind, names in problems.items():
        lines += [f"{len(names)} {kind}:", *(f"  {name}" for name in names)] if names else []
    return "\n".join(lines)


def _check_tied_head(files: WeightFiles, config: InternVLConfig) -> None:
    """A head that is stored although it is tied must be the embedding, or logits would change unseen."""
    stored = {chat_keys.disk_name(name): name for name in files.file_of}
    if not config.tie_word_embeddings or _HEAD not in stored:
        return
    with files.open() as weights:
        if not torch.equal(weights[stored[_HEAD]], weights[stored[_EMBEDDING]]):
            raise UserError(
                f"{files.folder}: `tie_word_embeddings` is true, and {_HEAD} is not the embedding; set it to false in "
                f"config.json, or take that weight out"
            )


def _model_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model, by its name in transformers' files."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    return {chat_keys.disk_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}


def _arrangement(version: str, config: InternVLConfig) -> Callable[[str, Tensor], Tensor]:
    if version == "v2":
        return lambda name, tensor: tensor
    return partial(chat_keys.arrange_for_transposed_tiles, downsample_ratio=config.downsample_ratio)


def _part_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    return {part: combined_hash({n: h for n, h in hashes.items() if part_of(n) == part}) for part in PARTS}


# ---- everything else ------------------------------------------------------------------------------------------------


def _read_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, "config.json")
    if not path.is_file():
        raise UserError(f"`model_name_or_path` must be a folder with a config.json; {folder} has none")
    config = json.loads(path.read_text())
    if not chat_config.is_chat_config(config) and config.get("model_type") != "internvl":
        types = ", ".join((*chat_config.CHAT_TYPES, chat_config.VISION_TYPE, "internvl"))
        raise UserError(f"{path} must be of model_type {types}, received {config.get('model_type')!r}")
    return config


def _processor(
    tokenizer: PreTrainedTokenizerBase, chat: Mapping[str, Any], config: InternVLConfig, version: str
) -> InternVLProcessor:
    """The processor that cuts and normalises as the published code does."""
    rows = config.text_config.vocab_size
    beyond = {
        t: i
        for name in IMAGE_TOKENS
        if (i := getattr(tokenizer, f"{name}_id")) >= rows
        for t in [getattr(tokenizer, name)]
    }
    if beyond:
        raise UserError(f"the embedding has {rows} rows, too few for the tokens {beyond} that the processor needs")
    is_cut = chat.get("dynamic_image_size", True) and chat.get("max_dynamic_patch", 6) > 1
    if is_cut and not chat.get("use_thumbnail", False):
        raise UserError("`use_thumbnail` in config.json must be true: transformers adds a thumbnail to every cut image")
    tiles = image_processor(
        config.vision_config.image_size[0],
        max_image_tiles=chat.get("max_dynamic_patch", 6) if is_cut else 1,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    tiles.min_patches = chat.get("min_dynamic_patch", 1)
    if version == "v1":
        tiles = TransposedTilesImageProcessor(**tiles.to_dict())
    return make_processor(tokenizer, config.vision_config, tiles, config.downsample_ratio)


def _original_config(folder: Path, config: InternVLConfig, version: str) -> dict[str, Any]:
    """The published configuration, when it describes the model that is to be written."""
    chat = _read_config(folder)
    if not chat_config.is_chat_config(chat):
        raise UserError(f"`original` must be a checkpoint in the layout internvl_chat; {folder} is not")
    if chat_config.ps_version(chat) != version:
        raise UserError(f"the model was converted with `ps_version` {version}, {folder}/config.json says another")
    theirs = _model_shapes(chat_config.transformers_config(chat, config.image_token_id))
    ours = _model_shapes(config)
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        raise UserError(_listed(f"{folder}/config.json describes another model", {"of another shape": different}))
    return chat


def _chat_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, read beside a `config.json` whose model type transformers does not know."""
    with tempfile.TemporaryDirectory() as alone:
        _copy_all_but_weights(folder, Path(alone))
        Path(alone, "config.json").unlink()
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} must hold its tokenizer, which cannot be read: {error}") from error
    tokenizer.name_or_path = str(folder)
    add_image_tokens(tokenizer)
    return tokenizer


def _load_processor(folder: Path) -> InternVLProcessor:
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} must hold its processor, which cannot be read: {error}") from error


def _copy_all_but_weights(folder: Path, output_dir: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name not in _STAGE_FILES:
            shutil.copyfile(path, output_dir / path.name)


def _write_generation_config(source: Path, output_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = source / "generation_config.json"
    if path.exists():
        shutil.copyfile(path, output_dir / path.name)
    else:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        GenerationConfig(**ids).save_pretrained(output_dir)
