"""The tiny recipe, shortened: vLLM in process writes, vLLM's own server judges and teaches, `sft` takes the result."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from random_vlm import save_random_vlm

from r1v_rl.runtime import DIE_WITH_PARENT

ROOT = Path(__file__).parents[2]
SHORT = {"dataset_size": 12, "eval_dataset_size": 12, "max_completion_length": 24, "num_generations": 2}


def start(command: str, recipe: str, fault: str = "", **keys) -> subprocess.Popen:
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    line = [sys.executable, "-m", "r1v_rl", command, "--config", f"recipes/tiny/{recipe}", *words]
    environment = {**os.environ, "R1V_FAULT": fault}
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*arguments, **keys) -> tuple[int, str, int]:
    """(exit code, what it printed, its pid)"""
    process = start(*arguments, **keys)
    output, _ = process.communicate(timeout=580)
    return process.returncode, output, process.pid


def served_for(pid: int) -> list[str]:
    """Processes of the server of a run, engine and all: they carry the run's pid."""
    mark = f"{DIE_WITH_PARENT}={pid}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark in (folder / "environ").read_bytes() + b"\0"
                and b"State:\tZ" not in (folder / "status").read_bytes()
            ):
                found.append((folder / "cmdline").read_text()[:80])
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """(folder, killed pid, its server's processes shortly after, finished pid); killed at its third reply, then run
    again."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_random_vlm(folder / "model", max_tiles=1)
    keys = {**SHORT, "model_name_or_path": model, "output_dir": folder / "out"}
    code, output, killed = run("distill", "distill.yaml", "reply_write:9", ablation=False, **keys)
    assert code == -9, output
    until = time.monotonic() + 10
    while served_for(killed) and time.monotonic() < until:
        time.sleep(0.2)
    left = served_for(killed)
    code, output, pid = run("distill", "distill.yaml", **keys)
    assert code == 0, output
    return folder, left, served_for(pid)


def test_no_server_outlives_its_run(distilled):
    _, after_kill, after_end = distilled
    assert after_kill == [] and after_end == []


def test_every_row_is_assessed_by_the_servers_model_and_the_right_ones_are_kept(distilled):
    folder, *_ = distilled
    rows = pq.ParquetFile(folder / "out/rows.parquet").read().to_pylist()
    assert len(rows) == 12 and all(0.0 <= row["text"] <= 1.0 for row in rows), "the schema binds what a toy may say"
    assert all(row["sub_scores"]["necessity_by_ablation"]["value"] is not None for row in rows)
    penalties = {row["penalty"] for row in rows}
    assert len(penalties) > 4 and min(penalties) >= 1.0
    kept = pq.ParquetFile(folder / "out/dataset.parquet").read().to_pylist()
    assert 0 < len(kept) == sum(row["kept"] is not None for row in rows)
    assert {row["distill"]["source"] for row in kept} == {"revised"}, "a random model is never right"
    assert all(row["completion"].endswith(f"\\boxed{{{row['answer']}}}") for row in kept)
    report = (folder / "out/report.html").read_text()
    assert report.count("data:image/png") >= 12 and "Right chains by score" in report
    assert json.loads((folder / "out/manifest.json").read_text())["stage"] == "distill"


def test_sft_takes_it_unchanged(distilled):
    folder, *_ = distilled
    keys = {"model_name_or_path": folder / "model", "dataset_name": folder / "out/dataset.parquet", "max_steps": 1}
    sizes = {"output_dir": folder / "sft", "per_device_train_batch_size": 2, "dataset_size": 2, "warmup_steps": 0}
    sizes["dataset_kwargs"] = "{}"  # the recipe's are for rows that are made
    code, output, _ = run("sft", "sft.yaml", **keys, **sizes)
    assert code == 0, output
    assert (folder / "sft/model.safetensors").exists()
