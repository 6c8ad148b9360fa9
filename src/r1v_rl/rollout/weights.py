"""The policy's weights under the names of its files on disk, which is what inference engines read."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from r1v_rl.models.parts import PARTS, part_of
from r1v_rl.models.sharding import whole_blocks


def trained_parts(policy: Any) -> set[str]:
    """Parts with a trainable parameter: what may have changed since the start.

    Parts are handed over whole, since engines fuse neighbouring weights, and read such a fusion as a whole.
    """
    return {part_of(name) for name, p in policy.named_parameters() if p.requires_grad}


def disk_weights(policy: Any, parts: Collection[str] = PARTS) -> dict[str, Tensor]:
    """All that `stream_disk_weights` yields."""
    return dict(stream_disk_weights(policy, parts))


def stream_disk_weights(policy: Any, parts: Collection[str] = PARTS) -> Iterator[tuple[str, Tensor]]:
    """Every weight of these parts by its name on disk, whole, LoRA merged in; the policy itself is not touched.

    Where the weights are spread over processes, all of these must take part; one layer is in memory at a time. A tied
    head is listed under its own name too: an engine that keeps a copy of it would go stale otherwise.
    """
    base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    for block in merged_weights(policy, parts):
        yield from revert_weight_conversion(base, block).items()


@torch.no_grad()
def merged_weights(policy: Any, parts: Collection[str] = PARTS) -> Iterator[dict[str, Tensor]]:
    """The same by the names that they have in the model, a block at a time."""
    base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    adapted = {} if base is policy else {n: m for n, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    for block in whole_blocks(base, lambda name: part_of(name) in parts):  # names on disk need not tell the part
        weights = dict(block) if base is policy else _without_adapter(block)
        for name, module in adapted.items():
            if f"{name}.weight" in weights:
                for adapter in module.active_adapters:
                    if adapter in module.lora_A:
                        weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight(adapter)
        yield weights


def _without_adapter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model that carries a LoRA adapter by the names that they would have without it."""
    return {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in weights.items()
        if "lora_" not in name and ".original_module." not in name
    }
