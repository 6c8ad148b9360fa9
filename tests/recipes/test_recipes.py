"""Every shipped recipe loads; every tiny one runs, shortened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1v_rl import cli
from r1v_rl.check.main import command_of
from r1v_rl.tracking.completions import read_rollouts
from r1v_rl.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_passes_the_check(recipe, monkeypatch, capsys):
    """Without loading weights, which are not here for most; the first line shows the command that runs the file."""
    monkeypatch.chdir(ROOT)
    place = str(recipe.relative_to(ROOT))
    assert cli.main(["check", "--config", place, "--missing_ok"]) == 0, capsys.readouterr().err
    if command_of(recipe) != "launch":
        assert place in recipe.read_text().splitlines()[0]
        assert yaml.safe_load(recipe.read_text())["output_dir"].startswith("outputs/")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The tiny starting model, its projector hardly trained."""
    folder = tmp_path_factory.mktemp("tiny") / "start"
    run("align", "align.yaml", "--output_dir", str(folder), "--max_steps", "3", "--warmup_steps", "1")
    assert (folder / "model.safetensors").exists() and (folder / "chat_template.jinja").exists()
    return folder


@pytest.mark.parametrize("use_vllm", ["true", "false"])
def test_tiny_grpo_runs_end_to_end(start, tmp_path, use_vllm):
    """With vLLM as shipped, and with `generate`: what a run leaves, as the README lists it."""
    shortened = {
        "model_name_or_path": start, "output_dir": tmp_path, "use_vllm": use_vllm, "max_steps": 3, "save_steps": 2,
        "dataset_size": 64, "eval_dataset_size": 24, "per_device_train_batch_size": 16, "max_completion_length": 24,
    }  # fmt: skip
    output = run("grpo", "grpo.yaml", *[word for key, value in shortened.items() for word in (f"--{key}", str(value))])
    assert "held-out accuracy, greedy, 24 rows" in output and "blank pictures" in output
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "report.html", "model.safetensors"):
        assert (tmp_path / name).exists(), name
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3]
    trl_names = {"reward", "reward_std", "rewards/accuracy/mean", "rewards/format/mean", "completions/mean_length"}
    assert trl_names | {"entropy", "clip_ratio/region_mean", "step_time", "grad_norm"} <= lines[0].keys()
    assert read_rollouts(tmp_path).num_rows == 3 * 16
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy_after"].keys() == {"value", "low", "high"} and summary["num_heldout"] == 24
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def run(command: str, recipe: str, *arguments: str) -> str:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "r1v_rl", command]
    line += ["--config", str(ROOT / "recipes" / "tiny" / recipe), *arguments]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
