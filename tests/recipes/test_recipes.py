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
    weights = [path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors")]
    assert weights == ["model.safetensors"]  # what vLLM reads when it is given the folder
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3]
    trl_names = {"reward", "reward_std", "rewards/accuracy/mean", "rewards/format/mean", "completions/mean_length"}
    assert trl_names | {"entropy", "clip_ratio/region_mean", "step_time", "grad_norm"} <= lines[0].keys()
    assert read_rollouts(tmp_path).num_rows == 3 * 16
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy_after"].keys() == {"value", "low", "high"} and summary["num_heldout"] == 24
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_the_tiny_chain_in_few_steps(tmp_path):
    """Every stage; the frozen parts keep their hashes, and text alone is answered as before, word by word."""
    few = {
        **{f"align{after}": {"max_steps": 2, "dataset_size": 64} for after in ("", "_selected", "_cot")},
        "sft": {"max_steps": 2, "dataset_size": 64},
        "iterate": {"taus": "0", "learning_rates": "1e-3", "dataset_size": 32, "max_completion_length": 48,
                    "num_resamples": 0, "warmup_steps": 0, "use_vllm": "false"},
        "grpo": {"max_steps": 2, "per_device_train_batch_size": 16, "max_completion_length": 48, "use_vllm": "false",
                 "reward_funcs": "format", "reward_weights": "1"},
        "evaluate": {"eval_dataset_size": 16, "text_dataset_size": 16, "max_completion_length": 48,
                     "use_vllm": "false"},
    }  # fmt: skip
    words = [word for stage, keys in few.items() for k, v in keys.items() for word in (f"--{stage}.{k}", str(v))]
    line = [sys.executable, "-m", "r1v_rl", "run", "recipes/tiny/chain.yaml", "--output_dir", str(tmp_path), *words]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "stages.md").read_text() in finished.stdout
    with_substitute = ["compose", "align", "align_selected", "align_cot"]
    stages = [*with_substitute, "transfer", "sft", "iterate", "grpo"]
    hashes = {s: json.loads((tmp_path / s / "manifest.json").read_text())["weight_hashes"] for s in stages}
    assert len({hashes[s]["vision_encoder"] for s in stages}) == 1
    assert len({hashes[s]["language_model"] for s in with_substitute}) == 1
    assert len({hashes[s]["language_model"] for s in stages[4:]}) == 1
    assert len({hashes[s]["projector"] for s in with_substitute}) == 4
    assert hashes["transfer"]["projector"] == hashes["align_cot"]["projector"]
    assert len({hashes[s]["projector"] for s in stages[4:]}) > 1
    texts = {s: text_answers(tmp_path / s / "evaluation.jsonl") for s in stages}
    assert all(texts[s] == texts["compose"] for s in with_substitute)
    assert all(texts[s] == texts["transfer"] for s in stages[4:])


def text_answers(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["id"], row["completion"]) for row in rows if row["set"] == "text"]


def run(command: str, recipe: str, *arguments: str) -> str:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "r1v_rl", command]
    line += ["--config", str(ROOT / "recipes" / "tiny" / recipe), *arguments]
    finished = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
