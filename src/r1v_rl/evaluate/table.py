"""The tables of a benchmark run: its own numbers, published ones beside them, and other runs tested item by item."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1v_rl.errors import UserError
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.measures import right_by_id
from r1v_rl.evaluate.published import PUBLISHED
from r1v_rl.evaluate.record import ANSWERS
from r1v_rl.evaluate.statistics import paired_test

PAPER_TOKENS = 64000


def markdown(record: Mapping[str, Any], compare: Sequence[str]) -> str:
    """`evaluation.md`: every table with what must be known to read it."""
    parts = [f"# {Path(record['model']).name or record['model']}", _lines(_own(record)), _notes(record)]
    parts += [
        f"## Beside published scores (pass@1, %)\n\n{_lines(rows)}" for rows in _published(record, compare) if rows
    ]
    if record.get("compared"):
        parts.append(f"## Against other runs, item by item\n\n{_lines(_paired(record['compared']))}")
    return "\n\n".join(parts) + "\n"


def console(record: Mapping[str, Any], compare: Sequence[str]) -> str:
    """The same tables in columns of equal width."""
    return "\n\n".join([*map(_columns, tables(record, compare)), _notes(record)])


def tables(record: Mapping[str, Any], compare: Sequence[str]) -> list[list[list[str]]]:
    """Rows of cells, the heading first: our numbers, published ones beside them, other runs."""
    found = [_own(record), *_published(record, compare), _paired(record.get("compared") or [])]
    return [rows for rows in found if len(rows) > 1]


def compared_runs(folders: Iterable[str], answers: Sequence[dict], seed: int) -> list[dict[str, Any]]:
    """A paired test against each folder's answers, for every benchmark that both have.

    Raises:
        UserError: If a folder holds no answers, or none to the same items.
    """
    found = []
    for folder in (folder for folder in folders if folder not in PUBLISHED):
        path = Path(folder, ANSWERS)
        if not path.exists():
            raise UserError(f"`compare`: {folder} holds no {ANSWERS}; name the `output_dir` of an evaluation")
        others = [json.loads(line) for line in path.read_bytes().splitlines()]
        for name in dict.fromkeys(row["set"] for row in answers):
            ours, theirs = (right_by_id([r for r in rows if r["set"] == name]) for rows in (answers, others))
            common = [row_id for row_id in ours if row_id in theirs]
            if not common:
                continue
            scores = ([sum(run[i]) / len(run[i]) for i in common] for run in (ours, theirs))
            found.append({"run": folder, "benchmark": name, **asdict(paired_test(*scores, seed=seed))})
        if not any(test["run"] == folder for test in found):
            raise UserError(f"`compare`: {folder} has no item in common with this run")
    return found


def _own(record: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        ["benchmark", "problems", "pass@1, % [95 %]", "pass@k", "majority", "tokens", "cut off", "unread", "LLM judged"]
    ]
    for name, found in record["benchmarks"].items():
        count = found["num_samples"]
        rows.append(
            [
                BENCHMARKS[name].title,
                str(found["num_problems"]),
                share(found["pass@1"]),
                f"@{count} {100 * found[f'pass@{count}']['value']:.1f}" if count > 1 else "-",
                f"{100 * found['majority']['value']:.1f}" if count > 1 else "-",
                f"{found['mean_tokens']:.0f}",
                *(f"{100 * found[key]:.1f} %" for key in ("truncated_frac", "unread_frac", "llm_judged_frac")),
            ]
        )
    return rows


def share(value: Mapping[str, float]) -> str:
    """`61.0 [54.2, 67.9]`, in per cent."""
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _notes(record: Mapping[str, Any]) -> str:
    lines = []
    for name, found in record["benchmarks"].items():
        benchmark = BENCHMARKS[name]
        part = (
            ""
            if found["num_problems"] == benchmark.num_rows
            else f", {found['num_problems']} of {benchmark.num_rows} problems"
        )
        limit = "" if found["max_tokens"] >= PAPER_TOKENS else f" (the paper's {PAPER_TOKENS} are not reached)"
        lines.append(
            f"* {benchmark.title}: {found['num_samples']} sample(s) a problem, temperature {found['temperature']}, "
            f"top-p {found['top_p']}, repetition penalty {found['repetition_penalty']}, up to {found['max_tokens']} "
            f"tokens{limit}{part}."
        )
    speed = f", {record['tokens_per_s']} tokens/s" if record.get("tokens_per_s") else ""
    return "\n".join([*lines, f"* {record['seconds']} s in all{speed}. Intervals: 95 %, bootstrap over problems."])


def _published(record: Mapping[str, Any], compare: Sequence[str]) -> list[list[list[str]]]:
    tables = []
    for source in (source for source in compare if source in PUBLISHED):
        models = PUBLISHED[source]
        names = [n for n in record["benchmarks"] if any(n in scores for scores in models.values())]
        if not names:
            continue
        ours = [f"{100 * record['benchmarks'][name]['pass@1']['value']:.1f}" for name in names]
        rows = [["model", *(BENCHMARKS[name].title for name in names)], [f"{record['model']} (measured here)", *ours]]
        rows += [
            [model, *(f"{scores[n]:.1f}" if n in scores else "-" for n in names)] for model, scores in models.items()
        ]
        tables.append(rows)
    return tables


def _paired(tests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["run", "benchmark", "items", "difference, points [95 %]", "better / worse", "p", "test"]]
    for test in tests:
        title = BENCHMARKS[test["benchmark"]].title if test["benchmark"] in BENCHMARKS else test["benchmark"]
        sides = f"{test['only_first']} / {test['only_second']}"
        items = str(test["num_problems"])
        rows.append(
            [test["run"], title, items, share(test["difference"]), sides, f"{test['p_value']:.3g}", test["test"]]
        )
    return rows


def _lines(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
