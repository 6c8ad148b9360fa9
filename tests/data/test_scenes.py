"""Every answer is recomputed here from the scene's text by other means; splits share no scene; rows repeat exactly."""

import re

import numpy as np
import pytest

from r1v_rl.data.scene_questions import KINDS, parse_scene, split_of
from r1v_rl.data.scenes import chance_accuracy, scene_item, scenes_rows
from r1v_rl.errors import DataError

NUM_ROWS = 1500


@pytest.fixture(scope="module")
def items():
    return [scene_item(split, 3, i) for split in ("train", "heldout") for i in range(NUM_ROWS)]


def brute_force(question: str, scenes: list[list[str]]) -> str:
    """The answer from the question's words and the scenes' words alone."""
    everything = [word for scene in scenes for word in scene if word != "."]
    if question.startswith("Which") and "frequent" in question:
        place = ["color", "shape", "number"].index(question.split()[1])
        values = [word.split("-")[place] for word in everything]
        most = max(values.count(v) for v in values)
        winners = {v for v in values if values.count(v) == most}
        assert len(winners) == 1, (question, scenes)
        return winners.pop()
    nouns = re.findall(r"(?:(red|blue|green|yellow) )?(circle|square|triangle|shape)s", question)

    def picked(noun, scene):
        color, shape = noun
        return [int(w.split("-")[2]) for w in scene if (not color or color in w) and (shape == "shape" or shape in w)]

    scenes = [[word for word in scene if word != "."] for scene in scenes]
    two_sides = len(nouns) == 2
    sides = [picked(n, scenes[0]) for n in nouns] if two_sides else [picked(nouns[0], scene) for scene in scenes]
    if question.startswith("How many"):
        return str(sum(len(side) for side in sides))
    if "difference" in question:
        return str(abs(sum(sides[0]) - sum(sides[1])))
    if "What is the sum" in question:
        return str(sum(sum(side) for side in sides))
    order = np.sign(len(sides[0]) - len(sides[1]))
    return {1: "more", -1: "fewer", 0: "equal"}[order] if two_sides else {1: "first", -1: "second", 0: "equal"}[order]


def test_every_answer_is_what_brute_force_finds(items):
    for item in items:
        words = [[c.word if c else "." for c in scene] for scene in item.scenes]
        assert item.question.answer == brute_force(item.question.text, words), item.problem


def test_no_scene_is_in_both_splits(items):
    for item in items:
        split = item.id.split("-")[1]
        assert {split_of(scene) for scene in item.scenes} == {split}, item.id


def test_rows_repeat_exactly_and_a_larger_n_only_adds():
    few, many = scenes_rows("train", 4, 11), scenes_rows("train", 8, 11)
    for a, b in zip(few, many, strict=False):
        assert {k: v for k, v in a.items() if k != "images"} == {k: v for k, v in b.items() if k != "images"}
        assert [im.tobytes() for im in a["images"]] == [im.tobytes() for im in b["images"]]
    assert scenes_rows("train", 1, 12)[0]["scene"] != few[0]["scene"]


def test_a_row_has_as_many_pictures_as_marks_and_its_scene_reads_back():
    for num_images in (0, 1, 2, None):
        for row in scenes_rows("heldout", 20, 5, num_images=num_images):
            assert row["problem"].count("<image>") == len(row["images"])
            assert num_images is None or len(row["images"]) == num_images
            scenes = [parse_scene(text) for text in row["scene"].split(" | ")]
            assert sum(t is not None for s in scenes for t in s) == row["num_objects"]
            assert row["problem"].count("<img>") == (0 if row["images"] else len(scenes))


def test_kinds_are_as_asked_for_and_all_by_default():
    assert {r["kind"] for r in scenes_rows("train", 150, 0, num_images=1)} == set(KINDS)
    assert {r["kind"] for r in scenes_rows("train", 20, 0, kinds=["count", "sum"])} == {"count", "sum"}


def test_pictures_differ_from_row_to_row_and_from_a_blank_one():
    rows = scenes_rows("train", 12, 0, num_images=1)
    assert len({row["images"][0].tobytes() for row in rows}) == 12
    assert all(np.asarray(row["images"][0]).std() > 10 for row in rows)


def test_guessing_the_commonest_answer_pays_little(items):
    rows = [{"template": i.question.template, "answer": i.question.answer} for i in items]
    assert chance_accuracy(rows) < 0.22


def test_chance_by_hand():
    rows = [{"template": t, "answer": a} for t, a in [("x", "1"), ("x", "1"), ("x", "2"), ("y", "3"), ("y", "4")]]
    assert chance_accuracy(rows) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"split": "test"}, "split"),
        ({"split": "train", "kinds": ["count", "colour"]}, "kinds"),
        ({"split": "train", "num_images": 3}, "num_images"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, named):
    with pytest.raises(DataError, match=named):
        scenes_rows(n=1, seed=0, **kwargs)
