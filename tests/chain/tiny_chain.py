"""A chain of short stages of a random tiny model, as files that `r1v-rl run` reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

REWARD = "def tokens(completion_ids, **_): return [sum(ids) % 7 / 7 for ids in completion_ids]\n"


def write_chain(folder: Path, model: Path, **changes) -> Path:
    """`chain.yaml`, its two recipes and the reward file in `folder`; the first stage starts from `model`."""
    (folder / "reward.py").write_text(REWARD)
    recipe = {
        "model_name_or_path": str(model), "dataset_name": "scenes", "dataset_size": 32, "output_dir": "outputs/unused",
        "dataset_kwargs": {"num_images": 1}, "trainable": ["projector"], "reward_funcs": [f"{folder}/reward.py:tokens"],
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 4,
        "learning_rate": 5e-3, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "report_to": [], "save_rollouts": False,
    }  # fmt: skip
    (folder / "first.yaml").write_text("# r1v-rl grpo --config first.yaml\n" + json.dumps(recipe))
    (folder / "second.yaml").write_text("# r1v-rl grpo --config second.yaml\n" + json.dumps(recipe))
    chain = {
        "output_dir": str(folder / "out"),
        "seed": 1,
        "evaluate": {
            "eval_dataset_name": "scenes", "eval_dataset_size": 12, "eval_dataset_kwargs": {"num_images": 1},
            "text_dataset_name": "scenes", "text_dataset_size": 6, "text_dataset_kwargs": {"num_images": 0},
            "max_completion_length": 6, "use_vllm": False, "answer_kind": "text",
        },
        "stages": [
            {"name": "first", "command": "grpo", "config": "first.yaml"},
            {"name": "second", "command": "grpo", "config": "second.yaml", "from": {"first": "model_name_or_path"},
             "evaluate_with": {"max_completion_length": 5}},
        ],
    }  # fmt: skip
    (folder / "chain.yaml").write_text(json.dumps({**chain, **changes}))
    return folder / "chain.yaml"


def judged_stage(folder: Path, base_url: str) -> dict:
    """A round after `first` whose chains are revised and scored by the chat model at `base_url`, one call at a time."""
    recipe = {
        "dataset_name": "scenes", "dataset_size": 12, "dataset_kwargs": {"num_images": 1}, "taus": [2], "seed": 5,
        "learning_rates": [1e-3], "use_vllm": False, "max_completion_length": 16, "generation_batch_size": 5,
        "temperature": 1.0, "answer_kind": "text", "trainable": ["projector"], "per_device_train_batch_size": 4,
        "max_length": 512, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "report_to": "none", "model_name_or_path": "outputs/unused",
        "output_dir": "outputs/unused", "scorer": "rubric", "judge_model": "judge", "reviser_model": "reviser",
        "judge_concurrency": 1, "judge_base_url": base_url,
    }  # fmt: skip
    (folder / "round.yaml").write_text("# r1v-rl iterate --config round.yaml\n" + json.dumps(recipe))
    return {"name": "round", "command": "iterate", "config": "round.yaml", "from": {"first": "model_name_or_path"}}


def start(chain: Path, *words: str) -> subprocess.Popen:
    """`r1v-rl run`, its output and its children's in one pipe."""
    command = [sys.executable, "-m", "r1v_rl", "run", str(chain), "--no-check", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(chain: Path, *words: str, code: int = 0) -> str:
    """Its output, once it has ended with this exit code."""
    process = start(chain, *words)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == code, output
    return output


def table(chain: Path) -> list[str]:
    """The lines of `stages.md`, without the seconds."""
    lines = (chain.parent / "out" / "stages.md").read_text().splitlines()
    return [re.sub(r"\s+", " ", re.sub(r"\| \d+ +\| (?=\w+ ?\w* +\|)", "| S | ", line)) for line in lines]


def processes_with(word: str) -> list[int]:
    """Pids of the processes whose command line holds this word, this one left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
