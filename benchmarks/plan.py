"""Memory that `r1v-rl plan` predicts beside what a run takes: the recipes of a folder, each in a process of its own.

    python benchmarks/plan.py [--quick] [--case NAME ...] [--small FOLDER] [--tiny FOLDER] [--steps N] [--json FILE]

A case runs some steps of a recipe on the CPU and reads from the kernel, while it runs, what its process holds: resident
memory at its peak (VmHWM), libraries and Python included, as `plan` counts it. GRPO is planned with the length that
completions had, since the recipe says their limit alone. `--small` is the repository in which the chain of
recipes/small has run, whose models and data are used; without it the tiny recipes alone. `--series` prints how the
resident memory goes on from step to step.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_KINDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")


@dataclass(frozen=True)
class Case:
    """One recipe."""

    name: str
    command: str
    steps: int
    model: str | None = None
    """Below the folder of models, which is that of the tiny or of the small chain."""

    @property
    def recipe(self) -> str:
        size, _, stage = self.name.partition("/")
        return str(ROOT / "recipes" / size / f"{stage}.yaml")


CASES = [
    Case("tiny/align", "align", 20),
    Case("tiny/sft", "sft", 20, "."),
    Case("tiny/grpo", "grpo", 3, "."),
    Case("small/align", "align", 12, "outputs/small/chain/compose"),
    Case("small/sft", "sft", 60, "outputs/small/chain/align"),
    Case("small/grpo", "grpo", 10, "outputs/small/chain/iterate"),
]


def main() -> None:
    options = _parser().parse_args()
    rows = []
    print(
        f"r1v-rl {version('r1v-rl')}, torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()}"
        f" cores, threads {os.environ.get('OMP_NUM_THREADS', 'all')}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'recipe':<14}{'planned':>10}{'measured':>10}{'error':>8}{'steps':>7}")
    for case in CASES:
        folder = options.tiny if case.name.startswith("tiny") else options.small
        if (options.case and case.name not in options.case) or folder is None:
            continue
        if case.model and not (folder / case.model / "config.json").exists():
            print(f"{case.name:<14}left out: {folder / case.model} holds no model (make demo, make chain)")
            continue
        steps = options.steps or (min(3, case.steps) if options.quick else case.steps)
        words = _words(case, folder)
        peak, series, length = measured(case, words, steps)
        terms = planned(case, [*words, "--completion_tokens", str(length)] if length else words)
        total = sum(terms.values())
        print(f"{case.name:<14}{total:>8.2f}GB{peak['VmHWM']:>8.2f}GB{total / peak['VmHWM'] - 1:>+8.0%}{steps:>7}")
        print("    " + ", ".join(f"{name} {size:.2f}" for name, size in terms.items()))
        print("    " + ", ".join(f"{kind} {peak[kind]:.2f}" for kind in _KINDS[1:]), flush=True)
        if options.series:
            print("    " + " ".join(f"{t:.0f}s:{gb:.2f}" for t, gb in series), flush=True)
        ratio = total / peak["VmHWM"]
        rows.append(
            {"case": case.name, "ours": total, "baseline": peak["VmHWM"], "terms": terms, "measured": peak}
            | dict.fromkeys(("ratio_median", "ratio_min", "ratio_max"), ratio)
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def planned(case: Case, words: list[str]) -> dict[str, float]:
    """What the plan names, in GB."""
    command = [sys.executable, "-m", "r1v_rl", "plan", case.command, "--config", case.recipe, *words]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    terms = dict(re.findall(r"^  (.+?) +([0-9.]+) GB$", output, re.MULTILINE))
    terms.pop("together")
    return {name: float(size) for name, size in terms.items()}


def measured(case: Case, words: list[str], steps: int) -> tuple[dict[str, float], list[tuple[float, float]], float]:
    """The most that the process held, in GB by kind; what it held every few seconds; tokens of a completion, or 0."""
    peak, series = dict.fromkeys(_KINDS, 0.0), []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "r1v_rl", case.command, "--config", case.recipe, *words]
        command += ["--output_dir", f"{folder}/out", "--max_steps", str(steps), "--save_strategy", "no"]
        command += ["--report_to", "none"]
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        started = shown = time.monotonic()
        while process.poll() is None:
            for kind, size in _resident(process.pid).items():
                peak[kind] = max(peak[kind], size)
                if kind == "VmRSS" and time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    series.append((shown - started, size))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(Path(folder, "log").read_text()[-3000:])
        lines = map(json.loads, Path(folder, "out", "metrics.jsonl").read_text().splitlines())
        length = max((line.get("completions/mean_length") or 0.0 for line in lines), default=0.0)
    return peak, series, length


def _resident(pid: int) -> dict[str, float]:
    """Kinds of resident memory, GB; nothing of a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {kind: int(kb) * 1024 / 1e9 for kind, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M) if kind in _KINDS}


def _words(case: Case, folder: Path) -> list[str]:
    """What the recipe names, where it lies."""
    words = ["--model_name_or_path", str(folder / case.model)] if case.model else []
    if case.name.startswith("tiny") or case.command == "plan":
        return words
    text = Path(case.recipe).read_text()
    data = re.search(r"^dataset_name: (\S+)", text, re.MULTILINE)
    assert data is not None
    return [*words, "--dataset_name", str(folder / data[1]), "--dataset_root", str(folder / "outputs/small/data")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps of each")
    parser.add_argument("--case", nargs="+", help="of " + ", ".join(case.name for case in CASES))
    parser.add_argument("--tiny", type=Path, default=ROOT / "outputs/tiny/start", help="the aligned tiny model")
    parser.add_argument("--small", type=Path, help="repository in which recipes/small/chain.yaml has run")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--series", action="store_true", help="resident memory every two seconds")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
