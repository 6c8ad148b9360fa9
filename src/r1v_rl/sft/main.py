"""`r1v-rl align`: from a recipe to a model whose projector reads pictures for its language model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from r1v_rl.config import build_configs, dump_recipe, read_recipe
from r1v_rl.sft.alignment import AlignmentConfig, align

CONFIGS = (AlignmentConfig,)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the projector is trained and the model stands in `output_dir`."""
    torch.set_flush_denormal(True)
    values = read_recipe(CONFIGS, argv, prog="r1v-rl align")
    (config,) = build_configs(CONFIGS, values)
    trainer = align(config)
    if trainer.accelerator.is_main_process:
        Path(config.output_dir, "config.yaml").write_text(dump_recipe(values))
    return 0
