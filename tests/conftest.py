"""Sets the process up before any test module imports torch or transformers: pytest loads this file first."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background by a shell: no child would hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

import r1v_rl  # noqa: F401  (process settings, before torch)

# Annotated shapes are checked at every call. `grpo.config` stays out: transformers takes an int for a float.
_TYPED = ["advantages", "batch", "loss", "metrics", "records", "rewards", "sampler"]
install_import_hook(["r1v_rl.models", *(f"r1v_rl.grpo.{name}" for name in _TYPED)], "beartype.beartype")
