"""SIGTERM and Ctrl-C: the step is finished, a checkpoint is left, the exit code says which signal it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from random_vlm import picture, save_random_vlm

from r1v_rl import checkpoints

RECIPE = """
model_name_or_path: {folder}/model
dataset_name: {folder}/rows.jsonl
output_dir: {folder}/run
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 8
max_steps: 5000
bf16: false
use_cpu: true
gradient_checkpointing: false
save_strategy: "no"
logging_steps: 1
report_to: []
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    save_random_vlm(folder / "model")
    rows = []
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
        rows.append(
            {"id": f"r{i}", "problem": "<image> How many red circles?", "answer": str(i), "images": [f"{i}.png"]}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_that_resumes(recipe, tmp_path, number, exit_code):
    run = _start(recipe, tmp_path)
    _wait_for_steps(tmp_path, run, 2)
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == exit_code, output
    left = checkpoints.latest_complete(tmp_path)
    assert left is not None and checkpoints.verify(left) == []
    step = checkpoints.step_of(left)
    resumed = _start(recipe, tmp_path, "--resume_from_checkpoint", "true", "--max_steps", str(step + 1))
    output, _ = resumed.communicate(timeout=90)
    assert resumed.returncode == 0, output
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == step + 1
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "report.html").exists()


def test_a_second_run_into_the_same_folder_is_refused(recipe, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    run = _start(recipe, tmp_path)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "checkpoint-3" in output and "resume_from_checkpoint" in output and "Traceback" not in output


def _start(recipe: Path, output_dir: Path, *more: str) -> subprocess.Popen:
    arguments = [
        "grpo",
        "--config",
        str(recipe / "recipe.yaml"),
        "--output_dir",
        str(output_dir),
        "--logging_steps",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "r1v_rl", *arguments, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def _wait_for_steps(output_dir: Path, run: subprocess.Popen, steps: int) -> None:
    deadline = time.monotonic() + 90
    path = output_dir / "metrics.jsonl"
    while time.monotonic() < deadline and run.poll() is None:
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.1)
    run.kill()
    raise AssertionError(f"no {steps} steps: {run.communicate()[0]}")
