"""What a process of FSDP2 or DeepSpeed keeps in a checkpoint: its own shards, as plain tensors in plain containers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from r1v_rl.errors import CheckpointError
from r1v_rl.state_files import load_tensors

_ADAPTER_FILE = "adapter_model.safetensors"
_LOSS_SCALER = "loss_scaler"  # of DeepSpeed: an object, constant but in fp16


def optimizer_state(optimizer: Any, engine: str | None) -> Any:
    """The state of accelerate's (wrapped) optimizer, this process's part of it.

    Args:
        engine: As `engines.engine_name` says.
    """
    if engine == "fsdp2":
        state = optimizer.state_dict()
        local = {
            index: {key: ("shard", v.to_local()) if isinstance(v, DTensor) else v for key, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": local}
    if engine == "zero3":
        state = optimizer.optimizer.state_dict()
        return {key: _plain(value) for key, value in state.items() if key != _LOSS_SCALER}
    if engine is not None:  # ZeRO 1 and 2
        zero = optimizer.optimizer
        return {"base": zero.optimizer.state_dict(), "masters": list(zero.single_partition_of_fp32_groups)}
    return optimizer.state_dict()


def load_optimizer_state(optimizer: Any, state: Any, engine: str | None) -> None:
    """Put back what `optimizer_state` took, on the same number of processes."""
    if engine == "fsdp2":
        parameters = _parameters(optimizer)
        spread = {
            index: {key: _spread(v, parameters[index]) for key, v in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": spread})
    elif engine == "zero3":
        zero = optimizer.optimizer
        whole = {**state, _LOSS_SCALER: zero.loss_scaler}
        zero.load_state_dict({torch.distributed.get_rank(): whole})
        zero.checkpoint_event_epilogue()
    elif engine is not None:
        zero = optimizer.optimizer
        zero.optimizer.load_state_dict(state["base"])
        for master, saved in zip(zero.single_partition_of_fp32_groups, state["masters"], strict=True):
            master.data.copy_(saved)
    else:
        optimizer.load_state_dict(state)


def shared_optimizer_state(optimizer: Any, states: Sequence[dict]) -> dict:
    """What `load_optimizer_state` takes on this process, of what several (or one) kept under DDP or FSDP2.

    Args:
        optimizer: Of a process of one, of DDP or of FSDP2.
        states: What `optimizer_state` gave on each of them, in order; under DDP all are alike.

    Raises:
        CheckpointError: If shards do not make up a whole weight, as on a mesh that has replicas of them too.
    """
    parameters = _parameters(optimizer)
    shared = {
        index: {key: _shared([state["state"][index][key] for state in states], parameters[index]) for key in values}
        for index, values in states[0]["state"].items()
    }
    return {**states[0], "state": shared}


def adapter_weights(policy: Any, checkpoint: str) -> dict[str, Tensor]:
    """The weights of an adapter in a checkpoint, by their names in the policy.

    Raises:
        CheckpointError: If one of the policy's trainable weights is not among them.
    """
    saved = load_tensors(Path(checkpoint, _ADAPTER_FILE))
    found = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            stored = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
            if stored not in saved:
                raise CheckpointError(f"{checkpoint}/{_ADAPTER_FILE} holds no `{stored}`, which trains")
            found[name] = saved[stored]
    return found


def _parameters(optimizer: Any) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shared(values: list, parameter: Any) -> Any:
    """This process's part of one value of each process: of a weight's shape, or the same on all of them."""
    whole = values[0]
    if isinstance(whole, tuple):
        whole = torch.cat([shard for _, shard in values])
        if whole.shape != parameter.shape:
            raise CheckpointError(
                f"the {len(values)} shards of the optimizer's state make up {list(whole.shape)} of a weight of "
                f"{list(parameter.shape)}: resume on the number of ranks that wrote them"
            )
    if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.device)
    return "shard", distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _spread(value: Any, parameter: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    local = value[1].to(parameter.device)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _plain(value: Any) -> Any:
    """An enumeration as its number."""
    return int(value) if isinstance(value, int) and type(value) not in (int, bool) else value
