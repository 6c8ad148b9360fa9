"""The table of stages: what it shows, and that it comes back as it was written."""

import pytest

from r1v_rl.chain.table import StageRow, StageTable, compare_parts
from r1v_rl.errors import CheckpointError

FOUND = {
    "accuracy": {"value": 0.5, "low": 0.45, "high": 0.55}, "blank_accuracy": {"value": 0.125, "low": 0.1, "high": 0.2},
    "mean_length": 53.26, "format_rate": 0.99,
}  # fmt: skip


def test_rows_and_rounds(tmp_path):
    table = StageTable(tmp_path)
    table.rows["align"] = StageRow({"recipe": {}}, 12.4, {"projector": "changed 12345678"}, {".": FOUND})
    rounds = {"round-1/model": FOUND, ".": {**FOUND, "text_accuracy": FOUND["accuracy"]}}
    table.rows["iterate"] = StageRow({"recipe": {}}, 100.0, {}, rounds)
    order = ["align", "iterate", "not run yet"]
    table.write(order)
    lines = (tmp_path / "stages.md").read_text().splitlines()
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:7] == ["stage", "accuracy", "blank pictures", "text only", "tokens", "format", "seconds"]
    assert cells[2] == [
        "align", "50.0 % [45.0, 55.0]", "12.5 % [10.0, 20.0]", "", "53.3", "99.0 %", "12", "", "changed 12345678", ""
    ]  # fmt: skip
    assert [row[0] for row in cells[2:]] == ["align", "iterate/round-1/model", "iterate"]
    assert cells[3][6:] == [""] * 4 and cells[4][3] == "50.0 % [45.0, 55.0]"
    assert StageTable.read(tmp_path).rows == table.rows


def test_parts_are_compared_with_the_parents():
    now = {"vision_encoder": "a" * 64, "projector": "b" * 64}
    assert compare_parts(now, None) == {"vision_encoder": "aaaaaaaa", "projector": "bbbbbbbb"}
    assert compare_parts(now, {**now, "projector": "c"}) == {
        "vision_encoder": "unchanged aaaaaaaa", "projector": "changed bbbbbbbb"
    }  # fmt: skip


def test_an_altered_file_is_refused_and_not_run_over(tmp_path):
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"says which stages are done, and cannot be read"):
        StageTable.read(tmp_path)
