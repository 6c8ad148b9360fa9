"""The engines that several processes train with (DDP, FSDP2, DeepSpeed ZeRO), as accelerate was asked for them."""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from r1v_rl.errors import UserError
from r1v_rl.models.parts import encoder_modules


def engine_name(accelerator: Accelerator) -> str | None:
    """`fsdp2`, `zero2` and the like; None for one process and for DDP, whose checkpoints are alike."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return None


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a process will hold a part of the weights only."""
    return engine_name(accelerator) in ("fsdp2", "zero3")


def keeps_frozen_tower(accelerator: Accelerator) -> bool:
    """Whether every process holds a frozen vision encoder whole."""
    return engine_name(accelerator) != "zero3"


def frozen_modules(model: nn.Module, accelerator: Accelerator) -> list[nn.Module]:
    """The vision encoder's modules where it is frozen, on the process's device: those that stay replicated."""
    return [
        module.to(accelerator.device)
        for module in encoder_modules(model)
        if not any(parameter.requires_grad for parameter in module.parameters())
    ]


def check_devices(args: TrainingArguments) -> None:
    """Before anything is loaded: one process trains on one GPU.

    Raises:
        UserError: If it sees more: `nn.DataParallel` would cut packed rows and pictures anywhere.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs: start one process for each with `accelerate launch --num_processes "
            f"{args.n_gpu}`, or name the one to use in CUDA_VISIBLE_DEVICES"
        )


def prepare_engine(trainer: Trainer) -> None:
    """Before the model is wrapped: refuse what would not work, and let a frozen vision encoder be replicated.

    Raises:
        UserError: Naming the key of the launch file to change.
    """
    accelerator = trainer.accelerator
    asked = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
    for kind, variable in asked.items():
        if os.environ.get(variable, "").lower() == "true" and accelerator.distributed_type != kind:
            raise UserError(
                f"the launch file asks for {kind}, and accelerate runs {accelerator.distributed_type.value}: it needs "
                f"GPUs for that (on CPUs: ZeRO with DS_ACCELERATOR=cpu, `ddp_backend: gloo` and no `use_cpu`)"
            )
    name = engine_name(accelerator)
    if name == "fsdp1":
        raise UserError("FSDP 1 is not supported: set `fsdp_version: 2` in the launch file")
    if name is not None and accelerator.mixed_precision == "fp16":
        raise UserError(f"{name} in fp16 cannot be resumed exactly: set `mixed_precision: bf16` in the launch file")
    if name == "fsdp2":
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.cpu_ram_efficient_loading:
            raise UserError(
                "with `fsdp_cpu_ram_efficient_loading: true` every process but the first starts without weights, and "
                "would roll out and see pictures with none: set it to false in the launch file"
            )
        if plugin.mixed_precision_policy is not None:  # log-probabilities and sums of gradients in bfloat16 are noise
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.ignored_modules = frozen_modules(trainer.model, accelerator)
        inside = {type(m).__name__ for module in plugin.ignored_modules for m in module.modules()}
        layers = plugin.transformer_cls_names_to_wrap or trainer.model._no_split_modules
        plugin.transformer_cls_names_to_wrap = sorted(set(layers) - inside)


def check_engine(accelerator: Accelerator, wrapped: nn.Module) -> None:
    """After the model is wrapped: it must run as the launcher was asked, else processes train each on its own.

    Raises:
        UserError: If it does not.
    """
    name = engine_name(accelerator)
    if name is None:
        right = accelerator.num_processes == 1 or isinstance(wrapped, DistributedDataParallel)
    elif name == "fsdp2":
        right = isinstance(wrapped, FSDPModule)
    else:
        from deepspeed import DeepSpeedEngine

        right = isinstance(wrapped, DeepSpeedEngine)
    if not right:
        raise UserError(
            f"{accelerator.num_processes} processes were launched to train by {name or 'DDP'}, and the model is a bare "
            f"{type(wrapped).__name__}: they would not exchange gradients. On CPUs set `use_cpu: true` in the recipe "
            f"for DDP"
        )
