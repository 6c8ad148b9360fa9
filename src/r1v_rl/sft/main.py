"""`r1v-rl sft` and `r1v-rl align`: from a recipe to a model fine-tuned on target texts, or to its projector alone."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, get_peft_config

from r1v_rl.config import DataConfig, HeldoutConfig, build_configs, dump_recipe, read_recipe
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import heldout_examples, load_configured_examples
from r1v_rl.errors import RecipeError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.sft.config import AlignConfig, PartsConfig, SFTConfig
from r1v_rl.sft.trainer import SFTTrainer
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tracking.manifest import RUN_MANIFEST, write_run_manifest
from r1v_rl.tracking.redaction import redact
from r1v_rl.tracking.report import write_report
from r1v_rl.training.launch import (
    check_output_dir,
    check_processes,
    exit_code,
    resume_value,
    say_contamination,
    take_model_keys,
)
from r1v_rl.training.ranks import watched_ranks

SFT_CONFIGS = (SFTConfig, DataConfig, HeldoutConfig, ModelConfig)
ALIGN_CONFIGS = (AlignConfig, DataConfig, HeldoutConfig, ModelConfig, PartsConfig)


def main(argv: Sequence[str]) -> int:
    """`r1v-rl sft`. Exit code 0 when done, 130 after Ctrl-C and 143 after SIGTERM (a checkpoint is left)."""
    values = read_recipe(SFT_CONFIGS, argv, prog="r1v-rl sft")
    configs = build_configs(SFT_CONFIGS, values)
    return _run("sft", values, configs, parent=configs[-1].model_name_or_path)


def align(argv: Sequence[str]) -> int:
    """`r1v-rl align`. The same, for the projector alone by default; joins two parts where no model is named."""
    values = read_recipe(ALIGN_CONFIGS, argv, prog="r1v-rl align")
    args, data, heldout, model, parts = build_configs(ALIGN_CONFIGS, values)
    if model.model_name_or_path:
        if parts.vision_encoder or parts.language_model:
            raise RecipeError(
                "`model_name_or_path` goes on from a model; `vision_encoder` and `language_model` join one"
            )
        return _run("align", values, (args, data, heldout, model), parent=model.model_name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        _compose(parts, data, args.seed, folder)
        composed = replace(model, model_name_or_path=folder)
        return _run("align", values, (args, data, heldout, composed), parent=None)


def _compose(parts: PartsConfig, data: DataConfig, seed: int, folder: str) -> None:
    """The recipe's two parts, joined in `folder`."""
    if not (parts.vision_encoder and parts.language_model):
        raise RecipeError(
            "align needs `model_name_or_path`, or both `vision_encoder` and `language_model`; received "
            f"vision_encoder={parts.vision_encoder!r}, language_model={parts.language_model!r}"
        )
    resolved = resolve_part(parts.vision_encoder), resolve_part(parts.language_model)
    compose_vlm(*resolved, folder, max_image_tiles=data.max_image_tiles or 1, seed=seed)


def _run(stage: str, values: dict, configs: tuple[Any, ...], parent: str | None) -> int:
    """Train, and leave the stage's folder; its manifest is written last."""
    args, *others = configs
    started = time.perf_counter()
    torch.set_flush_denormal(True)
    resume = resume_value(args)
    check_output_dir(args, resume)
    output_dir = Path(str(args.output_dir))
    trainer = build_trainer(args, *others)
    if trainer.accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / RUN_MANIFEST).unlink(missing_ok=True)  # it says that the folder is complete
        (output_dir / "config.yaml").write_text(dump_recipe(redact(values)))
    with watched_ranks(args):
        trainer.train(resume_from_checkpoint=resume)
        if trainer.stopped_by is not None:
            return exit_code(trainer.stopped_by)
        trainer.save_model(str(output_dir))
        _finish(trainer, stage, values, parent, time.perf_counter() - started)
    return 0


def build_trainer(args: SFTConfig, data: DataConfig, heldout: HeldoutConfig, model: ModelConfig) -> SFTTrainer:
    """A trainer whose rows are read, tokenized and counted: what is wrong with a recipe is said before it trains."""
    if data.dataset_name is None:
        raise RecipeError("`dataset_name` must name the training rows: `scenes`, a file, a folder or a hub id")
    take_model_keys(args, model)
    processor = load_processor(model.model_name_or_path, data.max_image_tiles)
    train = load_configured_examples(data, answer_required=False, seed=args.seed)
    tested = heldout_examples(heldout, data, args.seed, answer_required=False)
    say_contamination(train, tested, data)
    trainer = SFTTrainer(
        model=str(model.model_name_or_path),
        args=args,
        train_dataset=train,
        eval_dataset=tested or None,
        processing_class=processor,
        peft_config=get_peft_config(model),
    )
    check_processes(trainer)
    return trainer


def _finish(trainer: SFTTrainer, stage: str, values: dict, parent: str | None, seconds: float) -> None:
    weight_hashes = trainer.part_hashes()
    if not trainer.accelerator.is_main_process:
        return
    last = {k: v for entry in trainer.state.log_history for k, v in entry.items() if k not in ("epoch", "step")}
    metrics = {**last, "steps": trainer.state.global_step, "seconds": round(seconds, 1)}
    print(f"{seconds:.0f} s in all", flush=True)
    print(f"report: {write_report(Path(str(trainer.args.output_dir)))}", flush=True)
    write_run_manifest(
        str(trainer.args.output_dir),
        stage=stage,
        parent=parent,
        config=values,
        data_hash=trainer.data_hash(),
        weight_hashes=weight_hashes,
        seeds={"seed": trainer.args.seed},
        metrics=metrics,
    )
