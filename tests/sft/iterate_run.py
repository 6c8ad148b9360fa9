"""A short recipe of rounds, run from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[2]
RECIPE = {
    "dataset_name": "scenes", "dataset_size": 12, "dataset_kwargs": {"num_images": 1}, "taus": [2, 4],
    "learning_rates": [1e-3, 1e-4], "use_vllm": False, "max_completion_length": 16, "generation_batch_size": 5,
    "temperature": 1.0, "answer_kind": "text", "trainable": ["projector"], "per_device_train_batch_size": 4,
    "max_length": 512, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 1, "report_to": "none", "seed": 5,
}  # fmt: skip


def run(folder: Path, *, fault: str = "", timeout_s: float = 240, **keys) -> subprocess.CompletedProcess:
    """`r1v-rl iterate` into `folder/out`; `fault` kills it."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "out"), **keys}))
    command = [sys.executable, "-m", "r1v_rl", "iterate", "--config", str(recipe)]
    environment = {**os.environ, "R1V_FAULT": fault}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, cwd=ROOT
    )


def rows_of(path: Path) -> list[dict]:
    return pq.ParquetFile(path).read().to_pylist()
