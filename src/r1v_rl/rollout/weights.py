"""The policy's weights under the names of its files on disk, which is what inference engines read."""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from r1v_rl.models.parts import part_of


def trained_weights(policy: Any) -> dict[str, Tensor]:
    """Those of `disk_weights` that belong to a part with a trainable parameter: what may have changed since the start.

    Parts are whole, since engines fuse neighbouring weights, and read such a fusion as a whole.
    """
    trained = {part_of(name) for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {name: weight for name, weight in disk_weights(policy).items() if part_of(name) in trained}


@torch.no_grad()
def disk_weights(policy: Any) -> dict[str, Tensor]:
    """Every weight by its name on disk, LoRA merged in; the policy itself is not touched.

    A tied head is listed under its own name too: an engine that keeps a copy of it would go stale otherwise.
    """
    if not hasattr(policy, "peft_config"):
        return revert_weight_conversion(policy, dict(policy.state_dict()))
    base = policy.get_base_model()
    weights = {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in base.state_dict().items()
        if "lora_" not in name and ".original_module." not in name
    }
    for name, module in base.named_modules():
        for adapter in getattr(module, "active_adapters", []) if hasattr(module, "get_delta_weight") else []:
            if adapter in module.lora_A:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight(adapter)
    return revert_weight_conversion(base, weights)
