"""The optimizers of the tiny parts: Muon for the matrices of the layers, AdamW for everything else."""

from collections.abc import Sequence

import torch
from torch import nn


def muon_and_adamw(model: nn.Module, layers: nn.Module, *extra: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (at 4 lr) over the matrices inside `layers`, AdamW (at lr) over the rest of the model and `extra`."""
    matrices = [p for p in layers.parameters() if p.ndim == 2 and p.requires_grad]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    others += [p for module in extra for p in module.parameters()]
    return [
        torch.optim.Muon(matrices, lr=4 * lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def warm_and_decay(step: int, steps: int) -> float:
    """The factor on the learning rate: 3 % warm-up, flat, then linear to 1 % over the second half."""
    return min(1.0, (step + 1) / (0.03 * steps + 1)) * min(1.0, (steps - step) / (0.5 * steps) + 0.01)


def step_all(optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence) -> None:
    """One step of every optimizer and schedule; the gradients are gone afterwards."""
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
