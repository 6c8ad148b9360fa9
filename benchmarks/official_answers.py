"""The judge of answers beside the official verdicts of MathVista and MMMU: every disagreement with its reason.

    python benchmarks/official_answers.py --data FOLDER [--listing FILE.tsv]

FOLDER holds `mathvista_scoring/dev.jsonl` and `mmmu_val_scoring/dev.jsonl`: responses of models, what the official
script took from them, and its verdict. Reasons are told by rule from the row:

* guessed: what the official extraction holds is no option, and the script takes the nearest by edit distance
* program: the response is a program, and the official extraction took what it would print; none is run here
* names none, names several: the response names no option, or more than one, and the official one was inferred or drawn
* misread: the response states a letter, and the official extraction holds another option
* letter against text: the answer is a letter with a text that is not that option's
* box: the box holds something else than the rest of the response, and the box is the answer here
* rounded, substring: MMMU rounds open numbers to two decimals, and counts text as right that holds the gold anywhere
* ours: everything else
"""

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1v_rl.durable import replace_file
from r1v_rl.scoring import Verdict, judge_answers
from r1v_rl.scoring.prose import MARKED_LETTER, chosen_letter

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two sets")
    parser.add_argument("--listing", type=Path, help="write every disagreement to this file, tab-separated")
    parser.add_argument("--show", action="store_true", help="print what was read in each of them")
    options = parser.parse_args()
    listing = ["case\tid\tofficial\there\treason"]
    mathvista = _read(options.data / "mathvista_scoring" / "dev.jsonl")
    mmmu = _read(options.data / "mmmu_val_scoring" / "dev.jsonl")
    choices = [row | {"choices": list(row["index2ans"].values())} for row in mmmu if row["index2ans"]]
    listing += _case(
        "MathVista, extraction", [row for row in mathvista if row["extraction"]], "extraction", shows=options.show
    )
    listing += _case(
        "MathVista, response", [row for row in mathvista if row["response"]], "response", shows=options.show
    )
    listing += _case(
        "MMMU choices, response", [row for row in choices if row["response"]], "response", shows=options.show
    )
    listing += _case(
        "MMMU short answers, response", [row for row in mmmu if not row["index2ans"]], "response", shows=options.show
    )
    if options.listing:
        replace_file(options.listing, ("\n".join(listing) + "\n").encode())


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _case(name: str, rows: list[Row], field: str, *, shows: bool) -> list[str]:
    texts = [rf"\boxed{{{row[field]}}}" if field == "extraction" else row[field] for row in rows]
    golds = [row["answer"] for row in rows]
    # Golds that are lists name spellings of one answer: any of them is right.
    spellings = [gold if isinstance(gold, list) else [gold] for gold in golds]
    flat = [(i, str(gold)) for i, some in enumerate(spellings) for gold in some]
    judged = judge_answers(
        [texts[i] for i, _ in flat],
        [gold for _, gold in flat],
        [_kind(rows[i], gold) for i, gold in flat],
        [rows[i].get("choices") for i, _ in flat],
    )
    verdicts: list[Verdict] = [None] * len(rows)  # type: ignore[list-item]
    for (i, _), verdict in zip(flat, judged, strict=True):
        if verdicts[i] is None or verdict.correct:
            verdicts[i] = verdict
    reasons: Counter[str] = Counter()
    lines = []
    for row, verdict, some in zip(rows, verdicts, spellings, strict=True):
        official = row["true_false"] if "true_false" in row else _mmmu_says(row, some)
        if (verdict.correct is True) != official:
            reason = _reason(row, field, verdict)
            reasons[reason] += 1
            lines.append(f"{name}\t{row['id']}\t{'right' if official else 'wrong'}\t{verdict.reason}\t{reason}")
            if shows:
                print(f"{lines[-1]}: {row[field][-100:]!r} -> {verdict.answer!r}")
    differ = sum(reasons.values())
    print(
        f"{name:30}{len(rows):4} rows, {1 - differ / len(rows):6.1%} agree, ours {reasons['ours'] / len(rows):5.1%}; "
        + ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    )
    return lines


def _kind(row: Row, gold: str) -> str:
    if row.get("choices"):
        return "choice"
    if re.fullmatch("[A-Z]", gold):
        return "math"
    return "number" if re.search(r"\d", gold) and not re.search("[A-Za-z]{2}", gold) else "text"


def _mmmu_says(row: Row, golds: Sequence[str]) -> bool:
    """MMMU's rule: the letter; for open answers the number, or the gold anywhere in what was taken."""
    said = row["total_val_output"]
    if row["index2ans"]:
        return said == row["answer"]
    try:
        return round(float(said), 2) in [round(float(gold), 2) for gold in golds]
    except ValueError:
        return any(gold.lower() in said.lower() for gold in golds)


def _reason(row: Row, field: str, verdict: Verdict) -> str:
    options, text = row.get("choices"), row[field]
    if field == "response" and is_program(text):
        return "program"
    if not options:
        if "index2ans" not in row:
            return "ours"
        return "rounded" if _is_number(row["total_val_output"]) else "substring"
    if "extraction" in row and _option(row["extraction"], options) is None:
        return "guessed"
    if "\\boxed" in text and field == "response":
        return "box"
    if re.match(r"\W*[A-Z]\W", f"{verdict.answer} ") and verdict.reason == "unparsable":
        return "letter against text"
    letter = chosen_letter(text, options)
    if letter is not None and "extraction" in row:
        return "misread"
    named = _named(text, options)
    if len(named) != 1:
        return "names several" if named else "names none"
    return "ours"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _option(extraction: str, options: Sequence[str]) -> str | None:
    """The option that MathVista's script reads without measuring distances: `(B)` anywhere, a letter, or its text."""
    marked = re.findall(r"\(([a-zA-Z])\)", extraction)
    letter = marked[0].upper() if marked else extraction.strip()
    letters = [chr(ord("A") + index) for index in range(len(options))]
    if letter in letters:
        return options[letters.index(letter)]
    return letter if letter in options else None


def _named(text: str, options: Sequence[str]) -> set[int]:
    """Every option whose letter is marked or whose text stands in the response as words, in whatever sentence."""
    plain = text.casefold()
    found = {ord(letter) - ord("A") for letter in MARKED_LETTER.findall(text)}
    found |= {
        index
        for index, option in enumerate(options)
        if re.search(rf"(?<![a-z0-9]){re.escape(str(option).casefold())}(?![a-z0-9])", plain)
    }
    return found & set(range(len(options)))


def is_program(text: str) -> bool:
    """Whether a response is Python code; it is parsed and never run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.Call | ast.FunctionDef | ast.Assign) for node in ast.walk(tree))


if __name__ == "__main__":
    main()
