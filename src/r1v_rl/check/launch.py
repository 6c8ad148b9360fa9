"""The check of a file for `accelerate launch --config_file`: read by accelerate itself, known traps refused."""

from pathlib import Path

import yaml

from r1v_rl.errors import RecipeError


def launch_file(path: Path) -> str:
    """What a file for `accelerate launch --config_file` starts, read by accelerate itself.

    Raises:
        RecipeError: If accelerate cannot read it, or would start something else than it says.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, OSError, KeyError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not a file for `accelerate launch --config_file`: {error}") from error
    kind, processes = config.distributed_type.value, config.num_processes
    if kind == "MULTI_CPU" or (kind == "NO" and processes > 1):
        raise RecipeError(
            f"{path}: `distributed_type: {kind}` starts one process, not {processes}; on CPUs launch with "
            f"`--multi_gpu` and ACCELERATE_USE_CPU=true"
        )
    if config.use_cpu and kind in ("FSDP", "DEEPSPEED"):
        raise RecipeError(f"{path}: with `use_cpu: true` accelerate replaces {kind} by DDP; leave it out")
    settings = config.deepspeed_config or {}
    if settings.get("zero_stage") == 3 and not settings.get("zero3_save_16bit_model"):
        raise RecipeError(f"{path}: ZeRO-3 needs `zero3_save_16bit_model: true`, or no run leaves a model")
    return f"{path}: {kind}, {processes} process(es)"
