"""The policy's weights under the names of its files on disk, which is what inference engines read."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from r1v_rl.models.parts import PARTS, part_of


def trained_weights(policy: Any) -> dict[str, Tensor]:
    """Those of `disk_weights` that belong to a part with a trainable parameter: what may have changed since the start.

    Parts are whole, since engines fuse neighbouring weights, and read such a fusion as a whole.
    """
    return disk_weights(policy, _trained_parts(policy))


def frozen_weights(policy: Any) -> dict[str, Tensor]:
    """The others of `disk_weights`: what stays as it is."""
    return disk_weights(policy, set(PARTS) - _trained_parts(policy))


def _trained_parts(policy: Any) -> set[str]:
    return {part_of(name) for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def disk_weights(policy: Any, parts: Collection[str] = PARTS) -> dict[str, Tensor]:
    """Every weight of these parts by its name on disk, LoRA merged in; the policy itself is not touched.

    A tied head is listed under its own name too: an engine that keeps a copy of it would go stale otherwise.
    """
    base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    weights = _merged_weights(base) if base is not policy else dict(policy.state_dict())
    # names on disk need not tell the part
    return revert_weight_conversion(base, {name: w for name, w in weights.items() if part_of(name) in parts})


def _merged_weights(base: Any) -> dict[str, Tensor]:
    """The state of a model that carries a LoRA adapter, as if it had none and the adapter were in its weights."""
    weights = {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in base.state_dict().items()
        if "lora_" not in name and ".original_module." not in name
    }
    for name, module in base.named_modules():
        for adapter in getattr(module, "active_adapters", []) if hasattr(module, "get_delta_weight") else []:
            if adapter in module.lora_A:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight(adapter)
    return weights
