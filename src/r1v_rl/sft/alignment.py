"""Projector alignment: the projector alone learns to write what the language model reads; the rest stays as it is."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from r1v_rl.data.scene_lessons import scene_lessons
from r1v_rl.errors import RecipeError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.parts import freeze_all_but, part_module
from r1v_rl.models.vision import run_without_graph_where_frozen
from r1v_rl.tiny.parts import resolve_part

IGNORED = -100


@dataclass
class AlignmentConfig(SFTConfig):
    """`trl.SFTConfig`, and the parts that are joined before the projector trains."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A composed model to go on from; unset, the two parts below are joined."}
    )
    vision_encoder: str | None = field(
        default=None, metadata={"help": "Folder of the vision encoder; `tiny/vision_encoder` is the shipped one."}
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "Folder of the language model; `tiny/substitute_llm`, `tiny/reasoning_llm` are shipped."},
    )
    max_image_tiles: int = field(default=1, metadata={"help": "Tiles an image may be cut into; 1 never cuts."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are made when read; keep this off."})
    dataset_name: str = field(default="scenes", metadata={"help": "`scenes`: its worked examples on pictures."})


class CompletionCollator:
    """Rows `messages images completion` -> one right-padded batch whose labels are the completions alone."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        prompts = [
            self.processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        images = [image for row in rows for image in row["images"]]
        inputs = self.processor(text=prompts, images=images or None, add_special_tokens=False)
        completions = tokenizer([row["completion"] + tokenizer.eos_token for row in rows], add_special_tokens=False)
        pairs = list(zip(inputs["input_ids"], completions["input_ids"], strict=True))
        shape = len(pairs), max(len(p) + len(c) for p, c in pairs)
        ids, labels = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, (prompt, completion) in enumerate(pairs):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor([*prompt, *completion])
            labels[i, len(prompt) : end] = torch.tensor(completion)
            mask[i, :end] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if images:
            batch["pixel_values"] = torch.stack(list(inputs["pixel_values"]))
        return batch


class AlignmentTrainer(SFTTrainer):
    """`trl.SFTTrainer` that trains the projector alone; the vision encoder runs without a graph."""

    def __init__(self, model: nn.Module, args: AlignmentConfig, train_dataset: Any, processing_class: ProcessorMixin):
        freeze_all_but(model, ["projector"])
        run_without_graph_where_frozen(part_module(model, "vision_encoder"))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=CompletionCollator(processing_class),
        )


def _composed(config: AlignmentConfig, folder: str) -> str:
    """The recipe's two parts joined in `folder`."""
    if not (config.vision_encoder and config.language_model):
        raise RecipeError(
            "align needs `model_name_or_path`, or both `vision_encoder` and `language_model`; received "
            f"vision_encoder={config.vision_encoder!r}, language_model={config.language_model!r}"
        )
    parts = resolve_part(config.vision_encoder), resolve_part(config.language_model)
    compose_vlm(*parts, folder, max_image_tiles=config.max_image_tiles, seed=config.seed)
    return folder


def align(config: AlignmentConfig) -> AlignmentTrainer:
    """Joins the parts if need be, trains the projector, and leaves the model in `output_dir`."""
    if config.dataset_name != "scenes":
        raise RecipeError(f"align reads the dataset `scenes`; received dataset_name={config.dataset_name!r}")
    if config.max_steps < 1:
        raise RecipeError(f"`max_steps` must be at least 1: `scenes` has no end; received {config.max_steps}")
    with tempfile.TemporaryDirectory() as folder:
        start = config.model_name_or_path or _composed(config, folder)
        model = AutoModelForImageTextToText.from_pretrained(start, dtype="float32")
        processor = AutoProcessor.from_pretrained(start)
    rows = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    trainer = AlignmentTrainer(model, config, scene_lessons("train", rows, config.seed), processor)
    trainer.train()
    model.requires_grad_(True)
    trainer.save_model(config.output_dir)
    Path(config.output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says it all
    return trainer
