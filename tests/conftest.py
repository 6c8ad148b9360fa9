"""Sets the process up before any test module imports torch or transformers: pytest loads this file first."""

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

import r1v_rl  # noqa: F401  (process settings, before torch)

install_import_hook(["r1v_rl.grpo", "r1v_rl.models"], "beartype.beartype")  # annotated shapes are checked at every call
