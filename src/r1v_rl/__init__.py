"""RL post-training for vision-language reasoners: multimodal GRPO with rule-based rewards, and what feeds it."""

import importlib
from typing import Any

from r1v_rl.runtime import prepare as _prepare

_prepare()

_EXPORTS = {
    "GRPOConfig": "r1v_rl.grpo.config",
    "GRPOTrainer": "r1v_rl.grpo.trainer",
    "SFTConfig": "r1v_rl.sft.config",
    "SFTTrainer": "r1v_rl.sft.trainer",
    "compose_vlm": "r1v_rl.models.compose",
    "transfer_projector": "r1v_rl.models.transfer",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """What users import, found when it is asked for: `import r1v_rl` alone brings neither torch nor transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'r1v_rl' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
