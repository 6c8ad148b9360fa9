"""Rows of `recipes/small`: what is said of a box is what its picture shows, and counts agree with it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1v_rl.data import small_rows
from r1v_rl.errors import DataError

ASSETS = Path(__file__).parents[1] / "assets"
INK = {"blue": (0, 153, 255), "yellow": (255, 255, 0), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    assert small_rows.main([str(ASSETS), "--out", str(folder)]) == 0
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def colors_seen(picture: Path) -> set[str]:
    """The colours of at least a dozen pixels: the smallest object has 10 pixels a side."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return {name for name, ink in INK.items() if (np.abs(pixels - ink).sum(-1) < 60).sum() > 12}


def test_captions_name_the_colours_that_the_box_shows(written):
    """NLVR draws a scene in six orders of its boxes, its record has the first: pictures of other orders are here."""
    captions = [row for row in rows_of(written, "align") if row["images"][0].startswith("nlvr/")]
    assert len(captions) >= 12
    for row in captions:
        (picture,) = row["images"]
        assert colors_seen(written / picture) == {c for c in INK if c in row["completion"].lower()}, picture


def test_chains_count_what_they_list_and_end_on_the_answer(written):
    captions = {row["images"][0]: row["completion"].rstrip(".").lower() for row in rows_of(written, "align")}
    counting = [row for row in rows_of(written, "sft") if row["images"][0].startswith("nlvr/")]
    assert counting
    for row in counting:
        wanted = re.findall(r"How many (.+?) are in the image", row["problem"])[0]
        kind = wanted.replace("objects", "").rstrip("s").strip()
        chain, counts = row["completion"], []
        for i, picture in enumerate(row["images"], start=1):
            box = captions[picture]
            parts = [thing.split()[0] for thing in box.split(", ") if kind in thing and thing != "nothing"]
            counts.append(sum(map(int, parts)))
            sum_of_box = f"{' + '.join(parts)} = {counts[-1]}" if len(parts) > 1 else counts[-1]
            assert f"Box {i}: {box}; {wanted}: {sum_of_box}." in chain
        first, second = counts[0] + counts[1], sum(counts)
        together = f"Together: {counts[0]} + {counts[1]} = {first}, {first} + {counts[2]} = {second}."
        assert chain.endswith(f" {together}</think>\n\\boxed{{{second}}}") and str(second) == row["answer"]


def test_no_stage_sees_a_picture_that_is_held_out(written):
    held_out = {p for row in rows_of(written, "counting_heldout") for p in row["images"]}
    seen = {p for name in ("align", "sft", "counting_train") for row in rows_of(written, name) for p in row["images"]}
    assert held_out and not held_out & seen


def test_each_held_out_picture_has_three_more_questions_of_the_same_kinds(written):
    asked: dict[str, list[str]] = {}
    for row in rows_of(written, "counting_heldout") + (more := rows_of(written, "counting_heldout_more")):
        asked.setdefault(row["images"][0], []).append(row["problem"])
        assert row["completion"].endswith(f"\\boxed{{{row['answer']}}}")
    assert asked and all(len(set(problems)) == len(problems) == 4 for problems in asked.values())
    everywhere = rows_of(written, "counting_train") + rows_of(written, "counting_heldout")
    assert {row["problem"] for row in more} <= {row["problem"] for row in everywhere}


def test_a_question_without_its_scene_is_named(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "assets")
    (tmp_path / "assets" / "nlvr" / "dev.jsonl").write_text("")
    with pytest.raises(DataError, match=r"row nlvr-count/dev-.*no scene of this number"):
        small_rows.small_rows(tmp_path / "assets")


def test_ids_are_unique_in_every_file(written):
    for name in ("align", "sft", "counting_train", "counting_heldout", "counting_heldout_more"):
        ids = [row["id"] for row in rows_of(written, name)]
        assert len(ids) == len(set(ids)), name


@pytest.mark.parametrize(("file", "name"), [("dev", "dev-1572-0-9.png"), ("counting_dev", "dev-1572-0-1.png")])
def test_a_picture_of_an_unknown_order_is_named(tmp_path, file, name):
    shutil.copytree(ASSETS, tmp_path / "assets")
    path = tmp_path / "assets" / "nlvr" / f"{file}.jsonl"
    text = path.read_text()
    assert "dev-1572-0-0.png" in text
    path.write_text(text.replace("dev-1572-0-0.png", name))
    with pytest.raises(DataError, match=rf"row nlvr.*{name}"):
        small_rows.small_rows(tmp_path / "assets")
