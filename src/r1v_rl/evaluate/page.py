"""`evaluation.html`: the tables, and items of every benchmark with pictures and answers, filtered by plain CSS."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1v_rl.data.images import load_image
from r1v_rl.errors import DataError
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.table import tables
from r1v_rl.scoring.judging import question_text
from r1v_rl.tracking.charts import interval_chart
from r1v_rl.tracking.report import html_page
from r1v_rl.tracking.samples import escaped, picture_tag, shortened
from r1v_rl.types import Example

MAX_FAILURES, MAX_RIGHT, MAX_SAMPLES = 30, 6, 3
"""Shown of each benchmark; every answer is in `evaluation.jsonl`."""
OUTCOMES = {"wrong": "wrong", "unread": "no answer read", "cut": "cut off", "right": "right"}


def page(
    record: Mapping[str, Any],
    answers: Sequence[dict],
    examples: Mapping[str, Sequence[Example]],
    compare: Sequence[str],
) -> str:
    """The whole page. It loads nothing, runs no script, escapes every text."""
    title = Path(record["model"]).name or record["model"]
    chart = interval_chart(
        [
            (BENCHMARKS[name].title, found["pass@1"]["value"], found["pass@1"]["low"], found["pass@1"]["high"])
            for name, found in record["benchmarks"].items()
        ]
    )
    by_row: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in answers:
        by_row[row["set"], row["id"]].append(row)
    items = [_item(name, e, by_row[name, e.id]) for name, rows in examples.items() for e in _shown(name, rows, by_row)]
    return html_page(
        str(title),
        f'<h1>{escaped(title)}</h1><div class="soft">{escaped(record["model"])}</div>'
        f'<h2>pass@1, 95 % intervals over problems</h2><div class="card wide">{chart}</div>'
        f"{''.join(_table(rows) for rows in tables(record, compare))}"
        f"<h2>Items</h2>{_filters(list(examples))}{''.join(items)}</div>",
    )


def outcome(samples: Sequence[dict]) -> str:
    """What became of an item: right where every sample is, else the first reason that one is not."""
    failed = [row for row in samples if row["correct"] is not True]
    if not failed:
        return "right"
    if failed[0]["truncated"]:
        return "cut"
    return "unread" if failed[0]["reason"] in ("no answer", "unparsable") else "wrong"


def _shown(name: str, examples: Sequence[Example], by_row: Mapping[tuple[str, str], list[dict]]) -> list[Example]:
    """Failures spread over the benchmark, and a few that are right."""
    right: list[Example] = []
    failed: list[Example] = []
    for example in examples:
        (right if outcome(by_row[name, example.id]) == "right" else failed).append(example)
    return [*_spread(failed, MAX_FAILURES), *_spread(right, MAX_RIGHT)]


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    return list(examples) if len(examples) <= count else [examples[i * len(examples) // count] for i in range(count)]


def _filters(names: Sequence[str]) -> str:
    """Radio buttons before the items, and the rules by which they hide them; the items' `div` is left open."""
    outcomes, sets = {"all": "every outcome", **OUTCOMES}, {"all": "every benchmark"}
    sets |= {name: BENCHMARKS[name].title for name in names}
    buttons = "".join(
        f'<input type="radio" name="{group}" id="{group}-{key}"{" checked" if key == "all" else ""}>'
        f'<label for="{group}-{key}">{escaped(label)}</label>'
        for group, choices in (("outcome", outcomes), ("set", sets))
        for key, label in choices.items()
    )
    rules = "".join(
        f"#{group}-{key}:checked~.items .item:not(.{group}-{key}){{display:none}}"
        for group, keys in (("outcome", OUTCOMES), ("set", names))
        for key in keys
    )
    style = (
        "td,th{padding:2px 12px 2px 0;text-align:left;font-size:13px}label{margin-right:12px}.items{margin-top:12px}"
    )
    return f'<style>{style}{rules}</style>{buttons}<div class="items">'


def _item(name: str, example: Example, samples: Sequence[dict]) -> str:
    is_private = BENCHMARKS[name].is_private
    prompt = "(not shown: its authors ask for it)" if is_private else question_text(example)
    pictures = "" if is_private else "".join(_picture(source) for source in example.images)
    completions = "".join(_completion(row, is_private) for row in samples[:MAX_SAMPLES])
    number = sum(row["correct"] is True for row in samples)
    return (
        f'<div class="card sample item set-{name} outcome-{outcome(samples)}"><div class="ask">{pictures}'
        f'<div class="prompt"><h3>{escaped(BENCHMARKS[name].title)}: {escaped(example.id)}</h3>'
        f'<pre>{shortened(prompt)}</pre><span class="chip">gold <b>{escaped(example.answer)}</b></span>'
        f'<span class="chip">{number} of {len(samples)} right</span></div></div>'
        f'<div class="pair">{completions}</div></div>'
    )


def _completion(row: Mapping[str, Any], is_private: bool) -> str:
    tone = "up" if row["correct"] is True else "down"
    chips = [f"answer <b>{escaped(row['answer'])}</b>", escaped(row["reason"]), f"{row['num_tokens']} tokens"]
    chips += ["cut off"] if row["truncated"] else []
    chips += ["judged by the LLM"] if row["judged_by"] == "llm" else []
    text = "" if is_private else f"<pre>{shortened(row['completion'])}</pre>"
    return f'<div class="completion {tone}">{"".join(f"<span class=chip>{chip}</span>" for chip in chips)}{text}</div>'


def _picture(source: Any) -> str:
    try:
        return picture_tag(load_image(source))
    except DataError:
        return ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    return f'<div class="card" style="margin-top:12px"><table>{head}{"".join(body)}</table></div>'
