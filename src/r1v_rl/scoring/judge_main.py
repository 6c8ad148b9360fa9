"""`r1v-rl judge`: grade a file of gold answers and completions with the judge of the `accuracy` reward."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from r1v_rl.config import build_configs, read_recipe
from r1v_rl.durable import replacing
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.scoring.answers import REASONS
from r1v_rl.scoring.extraction import ANSWER_KINDS
from r1v_rl.scoring.format import with_prompt_think
from r1v_rl.scoring.rules import ANSWER_COLUMNS, RewardSettings, completion_text
from r1v_rl.scoring.workers import GraderPool, check_timeout

_BATCH = 512
_GOLD_COLUMNS = ("gold", *ANSWER_COLUMNS)
_DEFAULT = RewardSettings()


@dataclass
class JudgeConfig:
    """What `r1v-rl judge` reads and writes."""

    input: str | None = field(
        default=None,
        metadata={"help": "jsonl with `gold` and `completion`; `answer_kind` and `choices` where rows have their own."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "jsonl to write, each row with gold, correct, answer, reason; unset = INPUT.judged.jsonl."},
    )
    answer_kind: str = field(
        default=_DEFAULT.answer_kind,
        metadata={"help": "How answers are judged where a row does not say.", "choices": list(ANSWER_KINDS)},
    )
    reward_timeout_s: float = field(
        default=_DEFAULT.reward_timeout_s, metadata={"help": "Seconds after which one answer counts as timed out."}
    )
    reward_workers: int = field(default=_DEFAULT.reward_workers, metadata={"help": "Processes that judge."})
    prompt_opens_think: bool | None = field(
        default=None,
        metadata={"help": "Whether the prompt opened `<think>`; unset = told from each completion."},
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when every row stands judged in the output file."""
    arguments = ["--input", *argv] if argv and not argv[0].startswith("-") else list(argv)
    (config,) = build_configs((JudgeConfig,), read_recipe((JudgeConfig,), arguments, prog="r1v-rl judge"))
    if not config.input:
        raise RecipeError("judge needs `input`: a jsonl file with `gold` and `completion`")
    source = Path(config.input)
    if not source.is_file():
        raise RecipeError(f"`input` must be a jsonl file; {source} is not there")
    check_timeout(config.reward_timeout_s)
    output = Path(config.output) if config.output else source.with_suffix(".judged.jsonl")
    counts: Counter[str] = Counter()
    num_correct = num_told = 0
    started = time.perf_counter()
    with (
        GraderPool(config.reward_workers) as pool,
        replacing(output) as aside,
        open(aside, "w", encoding="utf-8") as file,
        tqdm(desc="judging", unit=" answers", disable=None) as bar,
    ):
        rows = read_rows(source)
        while batch := list(islice(rows, _BATCH)):
            for (_, row), verdict in zip(batch, judge_rows(pool, batch, config), strict=True):
                counts[verdict["reason"]] += 1
                num_told += verdict["correct"] is not None
                num_correct += verdict["correct"] is True
                # the verdict's `answer` takes the place of a gold of that name, and a second judge needs the gold
                file.write(json.dumps(row | {"gold": gold_of(row)} | verdict) + "\n")
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    total = counts.total()
    print(f"{total} answers in {seconds:.1f} s ({total / max(seconds, 1e-9) * 60:,.0f} a minute) -> {output}")
    print("  " + ", ".join(f"{reason} {counts[reason]}" for reason in REASONS))
    if num_told:
        print(f"  accuracy {num_correct / num_told:.4f} of {num_told} that can be judged")
    return 0


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what messages call the row, its columns).

    Raises:
        DataError: Naming the line that is no JSON object or lacks a column.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number} must be a JSON object; it cannot be read: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} must be a JSON object; received {type(row).__name__}")
            if gold_of(row) is None or not isinstance(row.get("completion"), str | list):
                raise DataError(
                    f"{path}:{number} must have `gold` (or {', '.join(ANSWER_COLUMNS)}) and the text `completion`; it "
                    f"has {', '.join(row) or 'nothing'}"
                )
            yield f"{path}:{number}", row


def gold_of(row: dict[str, Any]) -> Any:
    """The gold answer of a row, None where it has none."""
    return next((row[name] for name in _GOLD_COLUMNS if row.get(name) is not None), None)


def judge_rows(
    pool: GraderPool, rows: Sequence[tuple[str, dict[str, Any]]], config: JudgeConfig
) -> list[dict[str, Any]]:
    """`correct`, `answer` and `reason` of each row."""
    kinds = [row.get("answer_kind") or config.answer_kind for _, row in rows]
    for (name, _), kind in zip(rows, kinds, strict=True):
        if kind not in ANSWER_KINDS:
            raise DataError(f"{name}: answer_kind must be one of {', '.join(ANSWER_KINDS)}; received {kind!r}")
    verdicts = pool.judge_answers(
        [with_prompt_think(completion_text(row["completion"]), config.prompt_opens_think) for _, row in rows],
        [gold_of(row) for _, row in rows],
        kinds,
        [row.get("choices") for _, row in rows],
        config.reward_timeout_s,
    )
    return [asdict(verdict) for verdict in verdicts]
