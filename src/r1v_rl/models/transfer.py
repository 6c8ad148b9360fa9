"""Re-assembly: the projector that learned with a substitute language model moves to a reasoning one. Nothing trains.

Skywork R1V, section 2.1, step 2: the reasoning model brings its own tokenizer and chat template.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import r1v_rl.data.transposed_tiles  # noqa: F401  (makes its image processor known by name)
from r1v_rl.errors import UserError
from r1v_rl.models.compose import join_parts, load_language_model, load_tokenizer, make_processor
from r1v_rl.models.image_tokens import add_image_tokens, generation_prompt
from r1v_rl.models.parts import part_hashes
from r1v_rl.models.weight_files import load_weights

_PROBED_TOKENS = 4096
_DRIFTED_BELOW = 0.5


@dataclass
class Transfer:
    """The re-assembled model and what a person should know of it."""

    model: InternVLForConditionalGeneration
    changed: dict[str, tuple[Any, Any]]
    """What is another thing than in the substitute model: name -> (there, here)."""
    kept: dict[str, Any]
    embedding_cosine: float
    """Mean cosine between the two language models' embeddings of the same tokens: 1 = the same, about 0 = unrelated."""
    warnings: list[str] = field(default_factory=list)

    def report(self) -> str:
        """For the console: what changed, what did not, what to look out for."""
        lines = ["changed"]
        lines += [f"  {name:<20} {old!r} -> {new!r}" for name, (old, new) in self.changed.items()]
        lines += ["kept", *(f"  {name:<20} {value!r}" for name, value in self.kept.items())]
        lines += [f"embeddings of the same tokens: cosine {self.embedding_cosine:.3f}"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def transfer_projector(
    projector_from: str | Path, language_model: str | Path, output_dir: str | Path, *, dtype: str = "float32"
) -> Transfer:
    """Vision encoder and projector of one model, another language model with its own tokenizer, in `output_dir`.

    Args:
        projector_from: Folder of the substitute model, whose projector was trained.
        language_model: Folder of the reasoning language model, with tokenizer and chat template.

    Raises:
        UserError: If the projector cannot work there: another hidden size, image tokens or a chat template that the
            new tokenizer cannot carry, tiles that the model does not expect or that do not fit the context.
    """
    config = substitute_config(projector_from)
    llm = load_language_model(language_model, dtype)
    check_hidden_size(config, llm.config, projector_from, language_model)
    old = _substitute_processor(projector_from)
    tokenizer = load_tokenizer(str(language_model))
    add_image_tokens(tokenizer)
    vlm = load_weights(AutoModelForImageTextToText, projector_from, dtype=dtype)
    tower = vlm.model.vision_tower
    _check_tiles(config, old, projector_from)
    processor = make_processor(tokenizer, tower.config, old.image_processor, config.downsample_ratio)
    _check_context(processor, llm)
    cosine = _embedding_cosine(vlm, old.tokenizer, llm, tokenizer)
    rows = llm.get_input_embeddings().weight.shape[0]
    model = join_parts(tower, llm, processor, config.downsample_ratio, 0, dtype)
    model.model.multi_modal_projector.load_state_dict(vlm.model.multi_modal_projector.state_dict())
    changed = _changes(vlm, old, model, processor, llm, rows)
    transfer = Transfer(model, changed, _kept(model, processor), cosine, _warnings(vlm, llm, cosine))
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return transfer


# ---- what is refused ------------------------------------------------------------------------------------------------


def substitute_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of the model whose projector moves; refuses what is no composed model."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`projector_from` must be a model folder (a published internvl_chat checkpoint is converted first: "
            f"`r1v-rl convert`); {folder} cannot be read: {error}"
        ) from error
    if config.model_type != "internvl":
        raise UserError(
            f"`projector_from` must be a composed model (`internvl`), whose projector moves; {folder} is a "
            f"`{config.model_type}`"
        )
    wanted = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise UserError(
                f"{folder}/config.json must say `{key}`: {value!r}, as the projector is built here and in vLLM; "
                f"received {getattr(config, key)!r}"
            )
    return config


def _substitute_processor(folder: str | Path) -> InternVLProcessor:
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"`projector_from` must hold its processor too; {folder}: {error}") from error
    if not isinstance(processor, InternVLProcessor):
        raise UserError(f"`projector_from` must hold its processor too; {folder} has a {type(processor).__name__} only")
    return processor


def check_hidden_size(config: PretrainedConfig, llm: PretrainedConfig, source: Any, target: Any) -> None:
    """Refuses a language model that reads vectors of another size than the projector writes."""
    writes, reads = config.text_config.hidden_size, llm.hidden_size
    if writes != reads:
        raise UserError(
            f"the projector of {source} writes vectors of {writes} numbers, {target} reads {reads}: a projector moves "
            f"only between language models of the same hidden size; set `language_model` to a fine-tune of the same "
            f"base, or train a projector for this one with `r1v-rl align`"
        )


def _check_tiles(config: PretrainedConfig, processor: InternVLProcessor, folder: Any) -> None:
    """Processor and vision encoder of the substitute agree on the size of a tile and its tokens."""
    (side, _), (patch, _) = config.vision_config.image_size, config.vision_config.patch_size
    size = processor.image_processor.size
    if (size["height"], size["width"]) != (side, side):
        raise UserError(
            f"the processor of {folder} cuts tiles of {size['height']} x {size['width']} px and its vision encoder "
            f"reads {side} x {side}: set `size` in its processor_config.json to the encoder's"
        )
    tokens = int(side // patch * config.downsample_ratio) ** 2
    if not tokens == config.image_seq_length == processor.image_seq_length:
        raise UserError(
            f"a tile of {folder} becomes {tokens} visual tokens, its config.json says `image_seq_length` "
            f"{config.image_seq_length} and its processor {processor.image_seq_length}: set both to {tokens}"
        )


def _check_context(processor: InternVLProcessor, llm: PreTrainedModel) -> None:
    tiles = processor.image_processor.max_patches  # InternVL's processor cuts, whatever `crop_to_patches` says
    most = (tiles + (tiles > 1)) * processor.image_seq_length + 2
    if most >= llm.config.max_position_embeddings:
        raise UserError(
            f"one image becomes up to {most} tokens ({tiles} tile(s) and thumbnail), and the context of the language "
            f"model is {llm.config.max_position_embeddings}: lower `max_patches` in the processor_config.json of "
            f"`projector_from`"
        )


# ---- what is reported -----------------------------------------------------------------------------------------------


def _changes(
    vlm: PreTrainedModel,
    old: InternVLProcessor,
    model: PreTrainedModel,
    new: InternVLProcessor,
    llm: PreTrainedModel,
    rows: int,
) -> dict[str, tuple[Any, Any]]:
    """Everything about the text side that is not as it was, (before, after)."""
    texts = vlm.config.text_config, model.config.text_config
    tokenizers = old.tokenizer, new.tokenizer
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    moved = sum(vocabularies[0].get(token) != token_id for token, token_id in vocabularies[1].items())
    pairs = {
        "language_model": (vlm.name_or_path, llm.name_or_path),
        "family": tuple(f"{text.model_type}, {text.num_hidden_layers} layers" for text in texts),
        "vocabulary": tuple(len(vocabulary) for vocabulary in vocabularies),
        "tokens_moved": (0, moved),
        "rows_added": (0, model.get_input_embeddings().weight.shape[0] - rows),
        "image_token_ids": (old.image_token_ids, new.image_token_ids),
        "eos_token": tuple(tokenizer.eos_token for tokenizer in tokenizers),
        "pad_token": tuple(tokenizer.pad_token for tokenizer in tokenizers),
        "context_length": tuple(text.max_position_embeddings for text in texts),
        "generation_prompt": (generation_prompt(old), generation_prompt(new)),
        "chat_template": tuple(f"{len(processor.chat_template)} characters" for processor in (old, new)),
    }
    same = old.chat_template == new.chat_template
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or (name == "chat_template" and not same)}


def _kept(model: PreTrainedModel, processor: InternVLProcessor) -> dict[str, Any]:
    hashes, tiles = part_hashes(model), processor.image_processor
    return {
        "vision_encoder": hashes["vision_encoder"],
        "projector": hashes["projector"],
        "tiles": f"at most {tiles.max_patches} of {tiles.size['height']} px, {processor.image_seq_length} tokens each",
    }


def _warnings(vlm: PreTrainedModel, llm: PreTrainedModel, cosine: float) -> list[str]:
    shapes = [(c.model_type, c.num_hidden_layers) for c in (vlm.config.text_config, llm.config)]
    found = []
    if shapes[0] != shapes[1]:
        found.append(f"the language models are built differently, {shapes[0]} and {shapes[1]}: not one base model")
    if cosine < _DRIFTED_BELOW:
        found.append("the embeddings have little in common, and a projector survives a move between fine-tunes only")
    return found


@torch.no_grad()
def _embedding_cosine(
    vlm: PreTrainedModel, old: PreTrainedTokenizerBase, llm: PreTrainedModel, new: PreTrainedTokenizerBase
) -> float:
    """Mean over evenly chosen tokens that both vocabularies have; 0 where they have none."""
    tables = vlm.get_input_embeddings().weight, llm.get_input_embeddings().weight
    there, here = old.get_vocab(), new.get_vocab()
    common = sorted(token for token in here if token in there and here[token] < tables[1].shape[0])
    common = common[:: max(1, len(common) // _PROBED_TOKENS)]
    if not common:
        return 0.0
    before = tables[0][[there[token] for token in common]].float()
    after = tables[1][[here[token] for token in common]].float()
    return cosine_similarity(before, after).mean().item()
