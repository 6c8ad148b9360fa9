"""Which rows a round trains on, and why: D_t = (score >= tau_t) or (answered wrongly). Pure functions.

Source: Skywork R1V, section 2.2: D_rm(tau) = {RM(x) >= tau}, E = {answer of the last model is wrong}, D_t their union.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ChainSource = Literal["own", "revised", "resampled", "dataset", "none"]
CHAIN_SOURCES: tuple[ChainSource, ...] = ("own", "revised", "resampled", "dataset", "none")


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One row of the dataset in one round."""

    id: str
    correct: bool | None
    """Of the model's own answer; None where nobody can tell."""
    chain: str | None
    """What the row would be trained on: the model's own right chain, or what replaces a wrong one; None where nothing
    does."""
    source: ChainSource
    score: int | None
    """Of the chain, 0 to 5; None where there is none or the scorer cannot judge it."""
    problem: str = ""
    """Why there is no chain or no score."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a row is trained on."""

    selected: bool
    reason: str


def decide(row: JudgedRow, tau: int) -> Decision:
    """The row's place in the round, with the reason in words."""
    by_score = row.score is not None and row.score >= tau
    by_error = row.correct is False
    if row.correct is None:
        return Decision(False, f"left out: the answer cannot be judged{_because(row)}")
    if row.chain is None:
        wrong = "answered wrongly, but " if by_error else ""
        return Decision(False, f"dropped: {wrong}no right chain{_because(row)}")
    if by_score and by_error:
        return Decision(True, f"score {row.score} >= {tau}, and answered wrongly")
    if by_error:
        return Decision(True, "answered wrongly")
    if by_score:
        return Decision(True, f"score {row.score} >= {tau}")
    if row.score is None:
        return Decision(False, f"left out: cannot be scored{_because(row)}")
    return Decision(False, f"left out: score {row.score} < {tau}")


def select(rows: Sequence[JudgedRow], tau: int) -> list[Decision]:
    """One decision a row, in order; a row is selected once, whatever speaks for it."""
    return [decide(row, tau) for row in rows]


def summarize(rows: Sequence[JudgedRow], decisions: Sequence[Decision], tau: int) -> dict[str, Any]:
    """The counts of a round, `kept = by_score + by_error - by_both` among them."""
    kept = [row for row, decision in zip(rows, decisions, strict=True) if decision.selected]
    by_score = [row for row in kept if row.score is not None and row.score >= tau]
    by_error = [row for row in kept if row.correct is False]
    sources = Counter(row.source for row in kept)
    scores = Counter(row.score for row in rows)
    return {
        "rows": len(rows),
        "right": sum(row.correct is True for row in rows),
        "wrong": sum(row.correct is False for row in rows),
        "unjudged": sum(row.correct is None for row in rows),
        "kept": len(kept),
        "by_score": len(by_score),
        "by_error": len(by_error),
        "by_both": len(by_score) + len(by_error) - len(kept),
        **{source: sources[source] for source in CHAIN_SOURCES if source != "none"},
        "dropped": sum(row.chain is None and row.correct is not None for row in rows),
        "unscored": sum(row.chain is not None and row.score is None for row in rows),
        "scores": {str(score): scores[score] for score in range(6)},
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """The rounds as lines of text, one a round."""
    names = [name for name in summaries[0] if name != "scores"] if summaries else []
    lines = [names] + [[f"{summary[name]:g}" for name in names] for summary in summaries]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _because(row: JudgedRow) -> str:
    return f" ({row.problem})" if row.problem else ""
