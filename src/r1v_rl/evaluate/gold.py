"""Whether a benchmark and its grader fit: every item's own gold must be right, another item's gold must be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from r1v_rl.evaluate.accuracy import ACCEPTED, judge_responses
from r1v_rl.scoring.answers import normalised
from r1v_rl.types import Example


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """What came of it; a fault is (row id, gold, response, reason)."""

    num_items: int
    refused: list[tuple[str, str, str, str]]
    """Items whose own gold is not right."""
    num_others: int
    accepted: list[tuple[str, str, str, str]]
    """Items for which another item's gold, written differently, is right."""

    def __str__(self) -> str:
        line = (
            f"own gold right {self.num_items - len(self.refused)} of {self.num_items}, another item's "
            f"{len(self.accepted)} of {self.num_others}"
        )
        faults = [*self.refused, *self.accepted][:3]
        return line + "".join(f"; {row_id}: gold {gold!r}, {said!r} is {why}" for row_id, gold, said, why in faults)


def check_golds(examples: Sequence[Example], *, timeout_s: float) -> GoldCheck:
    """Feed gold answers as responses, in the form that the instruction asks for."""
    others = [(i, j) for i in range(len(examples)) if (j := _other(examples, i)) is not None]
    asked = [*examples, *(examples[i] for i, _ in others)]
    said = [str(example.answer) for example in [*examples, *(examples[j] for _, j in others)]]
    verdicts = judge_responses(
        asked, [f"Answer: \\boxed{{{gold}}}" for gold in said], answer_kind="math", timeout_s=timeout_s
    )
    rows: list[tuple[str, str, str, str]] = [
        (e.id, str(e.answer), text, v.reason) for e, text, v in zip(asked, said, verdicts, strict=True)
    ]
    count = len(examples)
    refused = [row for row, v in zip(rows[:count], verdicts[:count], strict=True) if v.correct is not True]
    accepted = [row for row, v in zip(rows[count:], verdicts[count:], strict=True) if v.correct is True]
    return GoldCheck(count, refused, len(others), accepted)


def _other(examples: Sequence[Example], position: int) -> int | None:
    """The next item, from the start after the last, whose gold is another one; with options where this has some."""
    row = examples[position]
    has_options = row.columns.get("answer_kind") == "choice"
    own = {_value(gold) for gold in row.columns.get(ACCEPTED) or [row.answer]}
    for step in range(1, len(examples)):
        other = examples[(position + step) % len(examples)]
        if (other.columns.get("answer_kind") == "choice") == has_options and _value(other.answer) not in own:
            return (position + step) % len(examples)
    return None


def _value(gold: object) -> str:
    """`5` of `x=5`: a name in front does not make it another answer."""
    return normalised(str(gold)).rpartition("=")[2]
