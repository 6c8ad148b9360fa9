"""The update of one group against TRL's own GRPOTrainer: same weights, same prompt, pictures and completions.

    python benchmarks/update.py [--quick] [--shape tiny|1b|2b] [--dtype float32|bfloat16] [--json FILE]

A case is T tiles, C tokens a completion, G completions. TRL's trainer makes its own batch from recorded completions;
ours gets the same ones. Before any time is printed, loss and gradients must agree. Then forward and backward of the
group are timed in the order ABBA; what is printed is the median of the pairs' ratios with their range, against:

  best      gradient checkpointing off, vision tower frozen and in eval mode, LM head at completion positions only
  vLLM      the same, and the forward of old log-probabilities that TRL makes for rollouts by vLLM
  defaults  the same, with gradient checkpointing, which is TRL's default

`cached`: the tower's features are there already (`vision_features: cache`, or a second update on a rollout). Memory is
the peak above the model, each side in a process of its own. `limit`: time of the bare matrix products of the update.
The weights are random, which changes no time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
from one_group import DEVICE, SHAPES, Baseline, Case, Ours, Shape, Work, flops, gate, matmul_rate, seconds

CASES = [Case(1, 64), Case(5, 64), Case(5, 256), Case(1, 256), Case(5, 256, mixed=True)]
GPU_CASES = [Case(5, 256), Case(13, 512)]


def pairs_of(ours: Callable, theirs: Callable, pairs: int) -> tuple[float, float, list[float]]:
    """Median seconds of both, and each pair's ratio, ABBA; the gate has warmed both up."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        order = ((0, ours), (1, theirs)) if pair % 2 == 0 else ((1, theirs), (0, ours))
        for side, step in order:
            times[side].append(seconds(step))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def limit_of(shape: Shape, case: Case, prompt: int, dtype: torch.dtype, step: Callable, pairs: int) -> dict[str, float]:
    """Seconds that the update's FLOPs take at the speed of its bare products, and the share of it that is reached: both
    are measured in turn, since a machine's speed changes."""
    work = flops(shape, case, prompt, shared=True, tower=False, dtype=dtype)
    tokens = prompt + case.completions * case.tokens
    rates, times = zip(*((matmul_rate(shape, tokens, dtype), seconds(step)) for _ in range(pairs)), strict=True)
    reached = statistics.median(work / rate / took for rate, took in zip(rates, times, strict=True))
    rate = statistics.median(rates)
    return {"seconds": work / rate, "reached": reached, "gflops": rate / 1e9}


def peak_memory(side: str, options: argparse.Namespace, case: Case) -> float:
    """MiB above the model, measured in a fresh process."""
    command = [sys.executable, __file__, "--shape", options.shape, "--dtype", options.dtype]
    command += ["--memory", side, json.dumps(asdict(case))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(side: str, work: Work) -> float:
    subject = Ours(work) if side == "ours" else Baseline(work, checkpointing=side == "defaults")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    subject.step()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return (peak - before) / 2**20


def run_case(options: argparse.Namespace, case: Case, pairs: int) -> dict:
    shape, dtype = SHAPES[options.shape], getattr(torch, options.dtype)
    work = Work(shape, case, dtype)
    theirs, ours = Baseline(work), Ours(work)
    agreed = gate(theirs, ours, dtype)
    prompt = theirs.batch["prompt_ids"].shape[1]
    baselines: dict[str, Callable] = {"best": theirs.step}
    if not options.best_only:
        baselines["vLLM"] = theirs.step_with_old_pass
        baselines["defaults"] = Baseline(work, checkpointing=True).step_with_old_pass
    row: dict[str, Any] = {"case": str(case), "prompt": prompt, "agreement": agreed}
    for tower, step in (("", ours.step), (" cached", ours.step_cached)):
        for name, baseline in baselines.items():
            if tower and name == "vLLM":
                continue
            own, other, ratios = pairs_of(step, baseline, pairs)
            modelled = flops(
                shape, case, prompt, shared=False, tower=True, passes=name != "best", gc=name == "defaults"
            ) / flops(shape, case, prompt, shared=True, tower=not tower, dtype=dtype)
            row[name + tower] = {"seconds": own, "baseline": other, "ratio": statistics.median(ratios),
                                 "range": [min(ratios), max(ratios)], "model": modelled}  # fmt: skip
    row["limit"] = limit_of(shape, case, prompt, dtype, ours.step_cached, pairs)
    if not options.best_only:
        row["memory"] = {side: peak_memory(side, options, case) for side in ("ours", "best", "defaults")}
    return row


def show(row: dict) -> None:
    print(f"{row['case']}  (prompt {row['prompt']} tokens; {row['agreement']})")
    for name, found in row.items():
        if isinstance(found, dict) and "ratio" in found:
            low, high = found["range"]
            print(
                f"    against {name:<16}{found['seconds']:8.3f} s{found['baseline']:9.3f} s{found['ratio']:8.2f} "
                f"({low:.2f}-{high:.2f}), cost model {found['model']:.1f}"
            )
    print(f"    limit {row['limit']['seconds']:.3f} s at {row['limit']['gflops']:.0f} GFLOP/s, "
          f"reached {row['limit']['reached']:.0%} with features cached")  # fmt: skip
    if "memory" in row:
        memory = row["memory"]
        print(f"    peak memory above the model {memory['ours']:.0f} MiB, TRL {memory['best']:.0f} MiB, with its "
              f"defaults {memory['defaults']:.0f} MiB: {memory['best'] / memory['ours']:.1f} times less")  # fmt: skip
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, three pairs")
    parser.add_argument("--best-only", action="store_true", help="only TRL's best settings, no memory")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--case", nargs="*", help="such as T=5,C=64,G=8 instead of the usual ones")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        side, case = options.memory
        print(
            measure_memory(side, Work(SHAPES[options.shape], Case(**json.loads(case)), getattr(torch, options.dtype)))
        )
        return
    names = ("torch", "transformers", "trl")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{DEVICE}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"{options.shape}, {options.dtype}")  # fmt: skip
    cases = CASES if options.shape == "tiny" else GPU_CASES
    if options.case:
        keys = {"T": "tiles", "C": "tokens", "G": "completions"}
        cases = [Case(**{keys[p[0]]: int(p[2:]) for p in text.split(",")}) for text in options.case]
    rows = []
    for case in cases[:1] if options.quick else cases:
        rows.append(run_case(options, case, 3 if options.quick else options.pairs))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
