"""Hostile answers against the judge: seconds to each verdict, deaths, and what the caller's memory grows by.

    python benchmarks/hostile_answers.py --data FOLDER [--runners main thread asyncio ranks] [--deadline 2]

FOLDER holds `hostile_answers/dev.jsonl` (name, gold, completion). Answers are judged one at a time, in the main thread,
in another one, from asyncio, and by two ranks of `accelerate launch` at once. Exit code 1 where a verdict comes later
than the deadline and 0.2 s, is `right` (but for those that are harmless), or memory grows by more than 50 MB.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from r1v_rl.scoring import GraderPool

SLACK_S = 0.2
MAX_GROWTH_MB = 50
RUNNERS = ("main", "thread", "asyncio", "ranks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=RUNNERS)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds an answer may take")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.data / "hostile_answers" / "dev.jsonl").read_text().splitlines()]
    failures = 0
    for runner in options.runners:
        if runner == "ranks":
            failures += _ranks(options)
        else:
            failures += _report(runner, rows, options.deadline)
    return int(failures > 0)


def _report(runner: str, rows: list[dict], deadline_s: float) -> int:
    with GraderPool(2) as pool:
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])
        before = _memory_mb()
        timed = _run(runner, lambda: [_judge(pool, row, deadline_s) for row in rows])
        growth = _memory_mb() - before
        kills = pool.num_kills
    late = [
        (row["name"], seconds) for row, (_, seconds) in zip(rows, timed, strict=True) if seconds > deadline_s + SLACK_S
    ]
    right = [row["name"] for row, (reason, _) in zip(rows, timed, strict=True) if reason == "right"]
    label = f"rank {os.environ['RANK']}" if "RANK" in os.environ else runner
    print(
        f"{label:8} {len(rows)} answers, slowest {max(seconds for _, seconds in timed):.3f} s, {kills} workers killed, "
        f"memory {growth:+.1f} MB; {dict(Counter(reason for reason, _ in timed))}; right: {right}; late: {late}",
        flush=True,
    )
    return len(late) + (growth > MAX_GROWTH_MB)


def _judge(pool: GraderPool, row: dict, deadline_s: float) -> tuple[str, float]:
    started = time.perf_counter()
    (verdict,) = pool.judge_answers([row["completion"]], [row["gold"]], timeout_s=deadline_s)
    return verdict.reason, time.perf_counter() - started


def _run(runner, function):
    if runner == "asyncio":

        async def inside_a_running_loop():
            return function()

        return asyncio.run(inside_a_running_loop())
    if runner == "main":
        return function()
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def _ranks(options: argparse.Namespace) -> int:
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no", __file__]
    command += ["--data", str(options.data), "--deadline", str(options.deadline), "--runners", "main"]
    return subprocess.run(command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}).returncode


def _memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
