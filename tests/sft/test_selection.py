"""Which rows a round trains on, by hand: D_t = (score >= tau) or (answered wrongly), each once, with a reason."""

import pytest

from r1v_rl.sft.iterate.selection import JudgedRow, decide, select, summarize, table

ROWS = [
    JudgedRow("a", True, "c", "own", 5),
    JudgedRow("b", True, "c", "own", 2),
    JudgedRow("c", False, "c", "revised", 4),
    JudgedRow("d", False, "c", "dataset", 1),
    JudgedRow("e", False, None, "none", None, "4 further tries were not right"),
    JudgedRow("f", True, "c", "own", None, "no score in the reply 'hm'"),
    JudgedRow("g", None, None, "none", None, "gold 'x': unparsable"),
    JudgedRow("h", False, "c", "resampled", None, "no score in the reply 'hm'"),
    JudgedRow("i", True, "c", "own", 0),
]
KEPT = {0: "abcdhi", 1: "abcdh", 2: "abcdh", 3: "acdh", 4: "acdh", 5: "acdh"}


@pytest.mark.parametrize("tau", range(6))
def test_a_round_keeps_what_scores_enough_and_what_was_wrong(tau):
    decisions = select(ROWS, tau)
    assert "".join(row.id for row, d in zip(ROWS, decisions, strict=True) if d.selected) == KEPT[tau]


def test_rows_kept_by_score_are_nested_and_errors_are_in_every_round():
    rounds = [{row.id for row in ROWS if decide(row, tau).selected} for tau in (2, 3, 4, 5)]
    assert rounds[0] >= rounds[1] >= rounds[2] >= rounds[3]
    assert all(kept >= {"c", "d", "h"} for kept in rounds)


def test_every_row_has_its_reason():
    assert {row.id: d.reason for row, d in zip(ROWS, select(ROWS, 3), strict=True)} == {
        "a": "score 5 >= 3",
        "b": "left out: score 2 < 3",
        "c": "score 4 >= 3, and answered wrongly",
        "d": "answered wrongly",
        "e": "dropped: answered wrongly, but no right chain (4 further tries were not right)",
        "f": "left out: cannot be scored (no score in the reply 'hm')",
        "g": "left out: the answer cannot be judged (gold 'x': unparsable)",
        "h": "answered wrongly",
        "i": "left out: score 0 < 3",
    }


def test_a_score_that_is_missing_is_no_zero():
    """With tau 0 every score is enough, and none is not."""
    assert decide(ROWS[8], 0).selected and not decide(ROWS[5], 0).selected


def test_a_right_row_without_a_chain_is_dropped():
    """Right, but cut off, and nothing replaced it."""
    decision = decide(JudgedRow("a", True, None, "none", None, "cut off"), 0)
    assert not decision.selected and decision.reason == "dropped: no right chain (cut off)"


def test_the_counts_of_a_round():
    summary = summarize(ROWS, select(ROWS, 3), 3)
    assert summary == {
        "rows": 9, "right": 4, "wrong": 4, "unjudged": 1,
        "kept": 4, "by_score": 2, "by_error": 3, "by_both": 1,
        "own": 1, "revised": 1, "resampled": 1, "dataset": 1, "dropped": 1, "unscored": 2,
        "scores": {"0": 1, "1": 1, "2": 1, "3": 0, "4": 1, "5": 1},
    }  # fmt: skip
    assert summary["kept"] == summary["by_score"] + summary["by_error"] - summary["by_both"]


def test_the_table_has_a_line_for_each_round():
    lines = table([{"round": t, "tau": t + 1, **summarize(ROWS, select(ROWS, t + 1), t + 1)} for t in (1, 2)])
    header, *rounds = [line.split() for line in lines.splitlines()]
    assert header[:3] == ["round", "tau", "rows"] and "scores" not in header
    assert [line[:3] for line in rounds] == [["1", "2", "9"], ["2", "3", "9"]]
    assert rounds[1][header.index("kept")] == "4"
