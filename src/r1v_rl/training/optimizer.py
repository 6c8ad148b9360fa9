"""Parameter groups: each part with its own learning rate."""

from typing import Any

from torch import nn

from r1v_rl.models.parts import PARTS, part_of


def parameter_groups(model: nn.Module, args: Any, *, decayed: set[str]) -> list[dict]:
    """Trainable parameters by part and by whether weight decay applies to them, each group with its learning rate.

    Args:
        model: Policy.
        args: `learning_rate`, `projector_learning_rate`, `vision_learning_rate`, `weight_decay`.
        decayed: Names of the parameters that weight decay applies to.
    """
    rates = {
        "vision_encoder": args.vision_learning_rate,
        "projector": args.projector_learning_rate,
        "language_model": None,
    }
    groups = []
    for part in PARTS:
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and part_of(name) == part and (name in decayed) == decays
            ]
            if parameters:
                rate = args.learning_rate if rates[part] is None else rates[part]
                decay = args.weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "part": part})
    return groups
