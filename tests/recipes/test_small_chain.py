"""The chain on real pretrained weights and real pictures: two steps of every stage."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from test_small import needs_packages

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "assets"


@needs_packages
def test_two_steps_of_every_stage(tmp_path):
    """compose, align, sft, iterate and grpo as shipped but for their length; vLLM answers and samples."""
    rows = tmp_path / "data"
    python("-m", "r1v_rl.data.small_rows", str(DATA), "--out", str(rows))
    shortened = {"max_steps": 2, "max_length": 512, "per_device_train_batch_size": 1, "warmup_steps": 0}
    few = {
        "compose": {},
        "align": {"dataset_name": rows / "align.jsonl", **shortened},
        "sft": {"dataset_name": rows / "sft.jsonl", **shortened},
        "iterate": {"dataset_name": rows / "counting_train.jsonl", **shortened, "taus": 0, "learning_rates": 1e-5,
                    "max_completion_length": 8, "num_resamples": 0},
        "grpo": {"dataset_name": rows / "counting_train.jsonl", "max_steps": 2, "num_generations": 4,
                 "per_device_train_batch_size": 8, "max_completion_length": 8, "warmup_steps": 0},
    }  # fmt: skip
    words = []
    for stage, keys in few.items():
        given = keys | ({"dataset_root": rows} if stage != "compose" else {})
        words += [word for key, value in given.items() for word in (f"--{stage}.{key}", str(value))]
    python("-m", "r1v_rl", "run", str(without_evaluation(tmp_path)), "--output_dir", str(tmp_path / "out"), *words)
    manifests = {s: manifest(tmp_path / "out" / s) for s in ("compose", "align", "sft", "iterate", "grpo")}
    hashes = {stage: found["weight_hashes"] for stage, found in manifests.items()}
    assert len({found["vision_encoder"] for found in hashes.values()}) == 1
    assert len({found["projector"] for found in hashes.values()}) >= 4  # GRPO's rewards may all be alike: no gradient
    assert hashes["align"]["language_model"] == hashes["compose"]["language_model"]  # the projector alone
    assert hashes["sft"]["language_model"] != hashes["align"]["language_model"]
    assert hashes["iterate"]["language_model"] != hashes["sft"]["language_model"]
    steps = [json.loads(line) for line in (tmp_path / "out" / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "reward" in line] == [1, 2]


def without_evaluation(folder: Path) -> Path:
    """The chain's file, whose stages are not measured."""
    chain = yaml.safe_load((ROOT / "recipes" / "small" / "chain.yaml").read_text())
    del chain["evaluate"]
    for stage in chain["stages"]:
        stage["config"] = str(ROOT / "recipes" / "small" / stage["config"])
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(chain))
    return path


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def python(*words: str) -> str:
    finished = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
