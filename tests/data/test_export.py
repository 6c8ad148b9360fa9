"""What is written is read again: columns, pictures embedded, by path or as files, and the added ones."""

import pyarrow as pa
import pytest
from PIL import Image

from r1v_rl.data.dataset import examples_from_rows, load_examples
from r1v_rl.data.export import write_jsonl, write_parquet
from r1v_rl.data.images import image_hash
from r1v_rl.errors import UserError

ADDED = {"completion": pa.string(), "note": pa.struct([("score", pa.float64()), ("by", pa.string())])}


@pytest.fixture
def rows(tmp_path):
    picture = Image.new("RGB", (8, 6), "red")
    picture.save(tmp_path / "red.png")
    table = [
        {"id": "a", "problem": "<image> What?", "images": [picture], "answer": "1", "level": 3, "note": "old"},
        {"id": "b", "problem": "<image> Why?", "images": [str(tmp_path / "red.png")], "answer": "2", "level": None},
        {"id": "c", "problem": "Text alone", "images": [], "answer": "3", "level": 5},
    ]
    values = [{"completion": f"chain {i}", "note": {"score": i / 2, "by": None}} for i in range(3)]
    return list(zip(examples_from_rows(table), values, strict=True))


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_written_and_read_again(rows, tmp_path, write):
    out = tmp_path / "out"
    out.mkdir()
    path = out / ("data.parquet" if write is write_parquet else "data.jsonl")
    write(path, rows, ADDED)
    again = load_examples(str(path), dataset_root=str(tmp_path) if write is write_parquet else None)
    for (before, values), after in zip(rows, again, strict=True):
        assert (after.id, after.answer) == (before.id, before.answer)
        assert [m["role"] for m in after.messages] == [m["role"] for m in before.messages]
        assert [b["type"] for b in after.messages[0]["content"]] == [b["type"] for b in before.messages[0]["content"]]
        assert [image_hash(i) for i in after.images] == [image_hash(i) for i in before.images]
        assert after.columns["level"] == before.columns["level"]
        assert {name: after.columns[name] for name in ADDED} == values, "an added column replaces an older one"
    assert len(list(out.glob("images/*.png"))) == (write is write_jsonl), "one file for one picture"


def test_a_column_of_mixed_values_is_named(tmp_path):
    table = [{"id": str(i), "problem": "?", "answer": "1", "odd": value} for i, value in enumerate((1, "x"))]
    with pytest.raises(UserError, match="column `odd`"):
        write_parquet(tmp_path / "x.parquet", [(e, {}) for e in examples_from_rows(table)], {})
