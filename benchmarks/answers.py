"""The judge of answers beside bare math-verify and TRL's accuracy_reward: who is right how often, and how fast.

    python benchmarks/answers.py [--data FOLDER] [--quick] [--mistakes] [--json FILE]

FOLDER holds `NAME/dev.jsonl` for any of: answer_equivalence (gold, pred, equal, kind, policy), verdict_cases (gold,
completion, equal). Without it, the few rows of tests/scoring/equivalence_cases.jsonl are taken, and the times are
measured. A gold without math delimiters is put between `$` for the two baselines, which read it worse without. The
official verdicts of two benchmarks are in benchmarks/official_answers.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
from math_verify import parse, verify
from trl.rewards import accuracy_reward

from r1v_rl.scoring import GraderPool, judge_answers

Row = dict[str, Any]
_OWN_ROWS = Path(__file__).parents[1] / "tests" / "scoring" / "equivalence_cases.jsonl"


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def completion(row: Row) -> str:
    if "completion" in row:
        return row["completion"]
    return row["pred"] if row["kind"] == "completion" else rf"\boxed{{{row['pred']}}}"


def delimited(gold: str) -> str:
    return gold if any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${gold}$"


def math_verify_says(completions: Sequence[str], golds: Sequence[str]) -> list[bool]:
    said = []
    for text, gold in zip(completions, golds, strict=True):
        right = False
        with contextlib.suppress(Exception):
            right = verify(parse(delimited(gold)), parse(text))
        said.append(right)
    return said


def trl_says(completions: Sequence[str], golds: Sequence[str]) -> list[bool]:
    said = []
    for text, gold in zip(completions, golds, strict=True):
        reward = None
        with contextlib.suppress(Exception):
            reward = accuracy_reward([[{"role": "assistant", "content": text}]], [delimited(gold)])[0]
        said.append(reward == 1.0)
    return said


def accuracy_case(name: str, rows: list[Row], mistakes: bool) -> Row:
    completions, golds = [completion(row) for row in rows], [row["gold"] for row in rows]
    kinds = ["choice" if row.get("kind") == "choice" else "math" for row in rows]
    verdicts = judge_answers(completions, golds, kinds, timeout_s=10)
    graders = {
        "ours": [item.correct is True for item in verdicts],
        "math-verify": math_verify_says(completions, golds),
        "TRL": trl_says(completions, golds),
    }
    found: Row = {"case": name, "rows": len(rows)}
    for grader, said in graders.items():
        right = sum(a == row["equal"] for a, row in zip(said, rows, strict=True))
        positives = sum(a and not row["equal"] for a, row in zip(said, rows, strict=True))
        found[grader] = {"right": right / len(rows), "false_positives": positives}
        print(f"{name:36}{grader:12}{right / len(rows):7.1%} of {len(rows)}, {positives} false positives")
    if mistakes:
        for row, item in zip(rows, verdicts, strict=True):
            if (item.correct is True) != row["equal"]:
                print(f"    {row['id']}: gold {row['gold'][-60:]!r}, answer {item.answer!r:.80}, {item.reason}")
    return found


def answers_of(number: int) -> tuple[list[str], list[str]]:
    """Ordinary answers of five forms, no two alike."""
    forms: list[Callable[[int], tuple[str, str]]] = [
        lambda i: (str(i), str(i)),
        lambda i: (rf"\frac{{{i}}}{{7}}", f"{i}/7"),
        lambda i: (rf"{i}\sqrt{{2}}", rf"\sqrt{{{2 * i * i}}}"),
        lambda i: (f"x^2+{i}x", f"x(x+{i})"),
        lambda i: (f"({i},{i + 1})", f"({i}, {i + 2})"),
    ]
    pairs = [forms[i % len(forms)](i + 2) for i in range(number)]
    return [gold for gold, _ in pairs], [rf"So it is \boxed{{{answer}}}." for _, answer in pairs]


def time_case(number: int, pairs: int) -> Row:
    golds, completions = answers_of(number)
    seconds: dict[str, list[float]] = {"ours": [], "math-verify": []}
    each: list[float] = []
    with GraderPool(2) as pool:
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])
        for _ in range(pairs):
            started = time.perf_counter()
            pool.judge_answers(completions, golds)
            seconds["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            math_verify_says(completions, golds)
            seconds["math-verify"].append(time.perf_counter() - started)
        for gold, text in zip(golds, completions, strict=True):
            started = time.perf_counter()
            pool.judge_answers([text], [gold])
            each.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["math-verify"], strict=True)]
    row = {
        "case": f"{number} answers, 2 workers",
        "ours": statistics.median(seconds["ours"]),
        "baseline": statistics.median(seconds["math-verify"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    percentiles = statistics.quantiles(each, n=100)
    print(
        f"{row['case']:36}{row['ours']:.2f} s, bare math-verify in one process {row['baseline']:.2f} s: "
        f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f}); one at a time p50 "
        f"{percentiles[49] * 1000:.2f} ms, p99 {percentiles[98] * 1000:.1f} ms"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the labelled sets")
    parser.add_argument("--quick", action="store_true", help="128 answers and one pair for the times")
    parser.add_argument("--mistakes", action="store_true", help="name every row that is judged against its label")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    names = ("math-verify", "latex2sympy2-extended", "sympy", "trl")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    sets: dict[str, list[Row]] = {"labelled rows of the tests": read(_OWN_ROWS)}
    if options.data:
        equivalence = read(options.data / "answer_equivalence" / "dev.jsonl")
        sets["answer_equivalence, policy null"] = [row for row in equivalence if row["policy"] is None]
        sets["verdict_cases"] = read(options.data / "verdict_cases" / "dev.jsonl")
    found = [accuracy_case(name, rows, options.mistakes) for name, rows in sets.items() if rows]
    found.append(time_case(128 if options.quick else 1024, 1 if options.quick else 3))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
