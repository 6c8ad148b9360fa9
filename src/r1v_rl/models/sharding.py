"""Whole weights of a model whose parameters are spread over processes (FSDP2, ZeRO-3), a layer at a time.

Every function here that touches such a model is collective: all processes call it, with the same names.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed as zero

from r1v_rl.errors import CheckpointError
from r1v_rl.models.parts import PARTS, part_of
from r1v_rl.state_files import combined_hash, tensor_hash

_LAYER = re.compile(r".*?\.\d+\.")
_ADAPTED = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module)\.")


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds a part of the parameters only."""
    return any(isinstance(p, DTensor) or _is_zero3(p) for p in model.parameters())


@contextmanager
def whole(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it the parameters (and buffers) of these names are whole, in `model` itself and in what is yielded; what
    is changed of them is lost."""
    owners = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    with ExitStack() as stack:
        held = [owner._parameters.get(leaf) for owner, leaf in owners.values()]
        if partitioned := [p for p in held if p is not None and _is_zero3(p)]:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        for owner, leaf in owners.values():
            parameter = owner._parameters.get(leaf)
            if isinstance(parameter, DTensor):
                gathered = nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)
                owner._parameters[leaf] = gathered
                stack.callback(owner._parameters.__setitem__, leaf, parameter)
        yield {name: getattr(owner, leaf).detach() for name, (owner, leaf) in owners.items()}


def whole_blocks(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[dict[str, Tensor]]:
    """The entries of `model.state_dict()` that are `wanted`, whole: a layer at a time where they are spread, else all
    at once. Within an iteration they are whole in the model too."""
    names = [name for name in model.state_dict(keep_vars=True) if wanted(name)]
    blocks: dict[str, list[str]] = {}
    spread = is_sharded(model)
    for name in names:
        blocks.setdefault(_block(name) if spread else "", []).append(name)
    for block in blocks.values():
        with whole(model, block) as tensors:
            yield tensors


def whole_state(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True, *, keep: bool = True
) -> dict[str, Tensor]:
    """The wanted part of `model.state_dict()`, whole, on the CPU; tied weights share memory in it as in the model.

    Args:
        keep: False on a process that takes part and needs nothing.
    """
    objects = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for block in whole_blocks(model, wanted):
        for name, tensor in block.items() if keep else ():
            state[name] = seen.setdefault(objects[name], tensor.to("cpu", copy=True))
    return state


def whole_hashes(model: nn.Module, *, keep: bool = True) -> dict[str, str]:
    """The `tensor_hash` of every entry of `model.state_dict()`, whole; `keep` as in `whole_state`."""
    hashes: dict[str, str] = {}
    for block in whole_blocks(model):
        hashes |= {name: tensor_hash(tensor) for name, tensor in block.items() if keep}
    return hashes


def hashes_by_part(hashes: Mapping[str, str]) -> dict[str, str]:
    """`parts.part_hashes` from what `whole_hashes` found."""
    return {part: combined_hash({n: h for n, h in hashes.items() if part_of(n) == part}) for part in PARTS}


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 has gathered for a forward: `requires_grad` of a gathered copy would not reach its shard."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded_twin(model: Any) -> Any:
    """A model of the same class and settings on the same device that is never spread, with weights of its own."""
    own_class: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    parameter = next(model.parameters())
    with whole_models_made():
        twin = own_class(copy.deepcopy(model.config))
    twin = twin.to(parameter.device, parameter.dtype).requires_grad_(False).eval()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


@contextmanager
def whole_models_made() -> Iterator[None]:
    """Within it models are made and read whole, where ZeRO-3 would spread them over the processes."""
    if not zero.is_deepspeed_zero3_enabled():
        yield
        return
    config = zero._hf_deepspeed_config_weak_ref()
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero.set_hf_deepspeed_config(config)


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole weights, the same on every process, where the model has them or its shards.

    Raises:
        CheckpointError: If the model has no weight of one of these names.
    """
    held: dict[str, Any] = model.state_dict(keep_vars=True)
    if unknown := sorted(set(state) - set(held)):
        raise CheckpointError(f"the model has no `{unknown[0]}` ({len(unknown)} of {len(state)} weights are unknown)")
    for name, tensor in state.items():
        place = held[name]
        if isinstance(place, DTensor):
            whole_tensor = tensor.to(place.device, place.dtype)
            shard = distribute_tensor(whole_tensor, place.device_mesh, place.placements, src_data_rank=None)
            place.to_local().copy_(shard.to_local())
        elif _is_zero3(place):
            import deepspeed

            with deepspeed.zero.GatheredParameters([place], modifier_rank=0):
                place.data.copy_(tensor)
        else:
            place.data.copy_(tensor)


def _is_zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _block(name: str) -> str:
    """The layer that a weight belongs to, else its module: with the adapter on it, which is merged as a whole."""
    layer = _LAYER.match(name)
    if layer:
        return layer[0]
    adapted = _ADAPTED.search(name)
    return name[: adapted.start()] if adapted else name.rpartition(".")[0]
