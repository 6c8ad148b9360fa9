"""What every training command does before its trainer starts: settings, processes, the folder of an earlier run."""

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, Trainer, TrainingArguments
from trl import ModelConfig, get_quantization_config

from r1v_rl.checkpoints import checkpoint_folders
from r1v_rl.config import DataConfig
from r1v_rl.data.contamination import check_contamination
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.evaluate.tested_rows import tested_rows
from r1v_rl.models.families import check_family
from r1v_rl.models.weight_files import load_weights
from r1v_rl.types import Example

DEFAULT_TRAINABLE = ("projector", "language_model")


def load_model(path: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model in a folder (or of a hub id), in float32 unless `init_kwargs` names a dtype.

    Raises:
        UserError: If its family is not one that the trainers know, or `init_kwargs` would have it run code.
    """
    given = {"dtype": "float32", **(init_kwargs or {})}
    if taken := sorted({"trust_remote_code", "use_safetensors", "weights_only"} & set(given)):
        raise RecipeError(
            f"`model_init_kwargs` must not set {', '.join(taken)}: code from a model repository is never run, and "
            "weights are read from safetensors alone"
        )
    check_family(path)
    return load_weights(AutoModelForImageTextToText, path, **given)


def unloaded_model(path: str) -> PreTrainedModel:
    """The model in a folder (or of a hub id) without its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))


def take_model_keys(args: Any, model: ModelConfig) -> None:
    """Put the keys `dtype` and `attn_implementation` where the trainer's model is loaded from."""
    if model.dtype not in (None, "auto"):
        args.model_init_kwargs = {"dtype": model.dtype, **(args.model_init_kwargs or {})}
    if model.attn_implementation:
        args.model_init_kwargs = {"attn_implementation": model.attn_implementation, **(args.model_init_kwargs or {})}
    if get_quantization_config(model) is not None:
        raise RecipeError("quantised models (`load_in_8bit`, `load_in_4bit`) are not supported by the trainers")


def check_processes(trainer: Trainer) -> None:
    """A launch that looks right may run one process, or several that do not know of each other: refuse it.

    Raises:
        UserError: If the launcher, accelerate and torch disagree on the number of processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerated = trainer.accelerator.num_processes
    joined = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not launched == accelerated == joined:
        raise UserError(
            f"the launcher started {launched} process(es), accelerate sees {accelerated}, torch.distributed {joined}: "
            f"on CPUs launch with `--multi_gpu` and ACCELERATE_USE_CPU=true, or with torchrun and `use_cpu: true`"
        )


def say_contamination(train: Sequence[Example], heldout: Sequence[Example], data: DataConfig) -> None:
    """Say once, in the first process of a run, whether training rows are test rows; see `check_contamination`."""
    if int(os.environ.get("RANK", "0")) == 0 and (tested := tested_rows(heldout, data)):
        print(f"contamination: {check_contamination(train, tested, data.contamination_check)}", flush=True)


def resume_value(args: TrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint`, which is text on a command line, as a bool where it says true or false."""
    value = args.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def check_output_dir(args: TrainingArguments, resume: str | bool | None) -> None:
    """Refuse to start a new run over the checkpoints of an earlier one."""
    if not resume and (found := checkpoint_folders(str(args.output_dir))):
        raise UserError(
            f"{args.output_dir} holds checkpoints of an earlier run ({found[-1].name}): continue it with "
            f"`resume_from_checkpoint: true`, name another `output_dir`, or delete the folder"
        )


def exit_code(stopped_by: int | None) -> int:
    """0 for a run that ended by itself, 128 + N for one that signal N ended (130 after Ctrl-C, 143 after SIGTERM)."""
    return 0 if stopped_by is None else 128 + stopped_by
