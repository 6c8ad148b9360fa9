"""`r1v-rl plan`: the memory and the FLOPs that a recipe will need, said before anything is loaded."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig
from trl import ModelConfig

from r1v_rl.check.main import command_of
from r1v_rl.check.stages import CONFIGS
from r1v_rl.config import DataConfig, build_configs, read_recipe
from r1v_rl.data.chat import load_processor, prompt_text, prompt_token_counter
from r1v_rl.data.dataset import load_configured_examples
from r1v_rl.errors import RecipeError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.models.compose import composed_config
from r1v_rl.plan.needs import KERNEL_CODE, Setting, Work, features_memory, flops_of, memory_of
from r1v_rl.plan.shape import BYTES, Shape
from r1v_rl.plan.work import grpo_work, sft_work
from r1v_rl.sft.config import PartsConfig, SFTConfig
from r1v_rl.sft.rows import TargetRows
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.training.launch import DEFAULT_TRAINABLE

COMMANDS = ("align", "sft", "grpo")
SAMPLED_ROWS = 128
VLLM_BUFFERS = 0.22e9
"""What a CPU process grows by when vLLM's engine is made, beside weights and KV cache, measured."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means over a recipe's rows, in tokens."""

    prompt: float
    """Visual tokens included."""
    visual: float
    completion: float | None
    """Of GRPO, None where it is not known before; of supervised training, the target."""
    rows: int
    """In all."""


def main(argv: Sequence[str]) -> int:
    """Prints the plan; 0 where it fits, or where no size of a device was given."""
    words = list(argv)
    named = words.pop(0) if words and not words[0].startswith("-") else None
    options, words = _parser().parse_known_args(words)
    command = named or command_of(Path(options.config))
    if command not in COMMANDS:
        raise RecipeError(f"plan knows recipes of {', '.join(COMMANDS)}, received {command!r}")
    values = read_recipe(CONFIGS[command], ["--config", options.config, *words], prog=f"r1v-rl plan {command}")
    if not torch.cuda.is_available():
        values |= {"use_cpu": True}  # else transformers refuses a recipe that is for another machine
    args, data, model, parts = _configs(command, values)
    device = None if options.device_memory_gb is None else options.device_memory_gb * 1e9
    config, processor = _model(options, model, data, parts)
    shape = Shape.of(config)
    lengths = _lengths(args, data, model, options, processor)
    work = _work(args, lengths)
    setting = Setting(
        trainable=tuple(args.trainable or DEFAULT_TRAINABLE),
        dtype=_dtype(model),
        compute_dtype="bfloat16" if args.bf16 else _dtype(model),
        checkpointing=args.gradient_checkpointing,
        has_reference=command == "grpo" and args.beta != 0.0,
        zero_stage=options.zero_stage,
        num_processes=options.num_processes,
        accumulates=work.passes > 1 or args.gradient_accumulation_steps > 1,
        logprobs_only=isinstance(args, SFTConfig) or not args.entropy_coef,
        on_cpu=device is None,
    )
    memory = {} if device is not None else {"process": _resident() + KERNEL_CODE}
    memory |= memory_of(shape, work, setting) | _sampler_memory(args, shape, setting.compute_dtype, device)
    if device is None and args.vision_features == "cache":
        visual, limit = lengths.visual * lengths.rows, args.vision_cache_memory_bytes
        memory["vision features"] = features_memory(shape, visual, setting.compute_dtype, limit)
    _show(options, shape, work, setting, memory)
    total = sum(memory.values())
    if device is not None and total > device:
        raise RecipeError(
            f"it does not fit: {total / 1e9:.0f} GB of {options.device_memory_gb:g} GB on each device. Lower "
            f"`max_tokens_per_forward`, `per_device_train_batch_size` or `vllm_gpu_memory_utilization`, set "
            f"`gradient_checkpointing`, or plan with a higher `--zero_stage` or `--num_processes`"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r1v-rl plan",
        usage="r1v-rl plan [align|sft|grpo] --config RECIPE.yaml [options] [--key value ...]",
        description="Memory of each process and FLOPs of a step, from a recipe and its model's config.json; no weights "
        "are loaded. The command is by default the one that the recipe's first line shows; further `--key value` pairs "
        "override the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--model_config", help="folder or file with another config.json than that of the model")
    parser.add_argument("--num_processes", type=int, default=1, help="devices that train")
    parser.add_argument("--zero_stage", type=int, default=0, choices=range(4), help="DeepSpeed's; FSDP2 is 3")
    parser.add_argument("--device_memory_gb", type=float, help="of one device; unset = main memory of a CPU run")
    parser.add_argument("--tflops", type=float, help="that one device reaches, for an estimate of the time")
    parser.add_argument("--prompt_tokens", type=float, help="mean; by default counted on the first rows")
    parser.add_argument("--visual_tokens", type=float, default=0.0, help="of `--prompt_tokens`; else counted")
    parser.add_argument("--completion_tokens", type=float, help="mean; by default `max_completion_length`, or counted")
    return parser


def _configs(command: str, values: Mapping[str, Any]) -> tuple[Any, DataConfig, ModelConfig, PartsConfig | None]:
    """Training keys, data keys, model keys, and those of the parts that `align` may join."""
    configs = build_configs(CONFIGS[command], values)
    args = next(config for config in configs if isinstance(config, GRPOConfig | SFTConfig))
    data = next(config for config in configs if type(config) is DataConfig)
    model = next(config for config in configs if isinstance(config, ModelConfig))
    return args, data, model, next((config for config in configs if isinstance(config, PartsConfig)), None)


def _model(
    options: argparse.Namespace, model: ModelConfig, data: DataConfig, parts: PartsConfig | None
) -> tuple[Any, Any]:
    """The model's configuration, and the processor where the recipe joins two parts."""
    place = options.model_config or model.model_name_or_path
    if place is None and parts is not None and parts.vision_encoder and parts.language_model:
        folders = resolve_part(parts.vision_encoder), resolve_part(parts.language_model)
        return composed_config(*folders, max_image_tiles=data.max_image_tiles or 1)
    return AutoConfig.from_pretrained(_existing(place)), None


def _existing(place: str | None) -> str:
    if place is None or not Path(place).exists():
        raise RecipeError(f"the model's configuration is needed: {place} is not here; name one in `--model_config`")
    return place


def _dtype(model: ModelConfig) -> str:
    return model.dtype if model.dtype in BYTES else "float32"


def _lengths(
    args: Any, data: DataConfig, model: ModelConfig, options: argparse.Namespace, processor: Any = None
) -> Lengths:
    """As given, or counted on the first rows."""
    if options.prompt_tokens is not None:
        return Lengths(options.prompt_tokens, options.visual_tokens, options.completion_tokens, 0)
    rows = load_configured_examples(data, seed=args.seed, answer_required=False)
    examples = rows[:SAMPLED_ROWS]
    processor = processor or load_processor(model.model_name_or_path, data.max_image_tiles)
    count = prompt_token_counter(processor, args.chat_template_kwargs)
    prompts = [count(example) for example in examples]
    texts = [prompt_text(processor, example, args.chat_template_kwargs) for example in examples]
    written = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    visual = sum(prompts) - sum(written) + sum(len(example.images) for example in examples)
    completion = options.completion_tokens
    assert not isinstance(args.chat_template_kwargs, str)
    if completion is None and isinstance(args, SFTConfig):
        samples = TargetRows(examples, processor, template_kwargs=args.chat_template_kwargs).lengths
        completion = fmean(samples) - fmean(prompts)
    return Lengths(fmean(prompts), visual / len(examples), completion, len(rows))


def _work(args: Any, lengths: Lengths) -> Work:
    if isinstance(args, SFTConfig):
        target = lengths.completion or 0.0
        return sft_work(args, sample=lengths.prompt + target, visual=lengths.visual, target=target)
    completion = lengths.completion or args.max_completion_length
    return grpo_work(args, prompt=lengths.prompt, visual=lengths.visual, completion=completion)


def _sampler_memory(args: Any, shape: Shape, dtype: str, device_memory: float | None) -> dict[str, float]:
    """What vLLM takes where the run is: in the same process, or in servers that share its devices."""
    if not getattr(args, "use_vllm", False):
        return {}
    count = args.vllm_num_servers if args.vllm_mode == "server" else 1
    if args.vllm_mode == "server" and (args.vllm_server_base_url or args.vllm_server_devices):
        return {}
    weights = sum(shape.parameters.values()) * BYTES[dtype] / args.vllm_tensor_parallel_size
    if device_memory is None:
        libraries = _resident() if args.vllm_mode == "server" else 0.0
        return {"vLLM": count * (weights + (args.vllm_kv_cache_memory_bytes or 0) + VLLM_BUFFERS + libraries)}
    share = count * args.vllm_gpu_memory_utilization * device_memory
    if count * weights > share:
        raise RecipeError(
            f"it does not fit: vLLM holds {count * weights / 1e9:.0f} GB of weights on each device, its share is "
            f"{share / 1e9:.0f} GB. Raise `vllm_tensor_parallel_size` (now {args.vllm_tensor_parallel_size}) or "
            f"`vllm_gpu_memory_utilization` (now {args.vllm_gpu_memory_utilization:g})"
        )
    return {"vLLM": share}


def _resident() -> float:
    """Bytes of main memory that this process holds: what a training one holds before its model is loaded."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(options: argparse.Namespace, shape: Shape, work: Work, setting: Setting, memory: Mapping[str, float]) -> None:
    millions = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in shape.parameters.items())
    print(f"{options.config}\n  parameters: {millions}; {', '.join(setting.trainable)} train in {setting.dtype}")
    print(f"  a pass: {work.tokens:,.0f} tokens, {work.scored:,.0f} of them scored; {work.passes} a micro-batch")
    print(f"\nmemory of each of {setting.num_processes} process(es), ZeRO stage {setting.zero_stage}")
    for name, size in memory.items():
        print(f"  {name:<26}{size / 1e9:10.2f} GB")
    print(f"  {'together':<26}{sum(memory.values()) / 1e9:10.2f} GB")
    flops = flops_of(shape, work, setting)
    print("\nFLOPs of a micro-batch on each process")
    for name, count in flops.items():
        print(f"  {name:<26}{count / 1e12:10.2f} TFLOP")
    total = sum(flops.values()) / 1e12
    seconds = f", {total / options.tflops:.1f} s at {options.tflops:g} TFLOP/s" if options.tflops else ""
    print(f"  {'together':<26}{total:10.2f} TFLOP{seconds}", flush=True)
