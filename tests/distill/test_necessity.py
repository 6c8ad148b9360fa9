"""Necessity by rules: real rows with their own pictures, blank ones and others'; made-up questions; a whole run."""

import json
from pathlib import Path

import pytest
from distill.distill_run import rows_of, run
from distill.test_drawing import drawn
from PIL import Image
from random_vlm import save_random_vlm
from scoring.chat_server import ChatServer

from r1v_rl.data.dataset import load_examples
from r1v_rl.distill.config import build_recipe
from r1v_rl.distill.drawing import look
from r1v_rl.distill.necessity import UNKNOWN, necessity_by_rules
from r1v_rl.errors import RecipeError

ASSETS = Path(__file__).parents[1] / "assets"
COUNTING = ASSETS / "nlvr" / "counting_dev.jsonl"
SCENE = look(drawn((4, (50, 50), 30, 0, "red"), (0, (140, 50), 30, 0, "blue"), (0, (140, 150), 15, 0, "blue")))
NOISE = look(Image.effect_noise((200, 200), 60).convert("RGB"))


def real(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(question, answer, *sights, choices=None):
    return necessity_by_rules(question, answer, choices, sights or (SCENE,))


def score_of(row, folder, images):
    sights = [look(Image.open(folder / image).convert("RGB")) for image in images]
    return necessity_by_rules(row["problem"], row["answer"], row.get("choices"), sights).value


def test_nlvr_counts_are_borne_out_by_their_own_pictures_and_seldom_by_others():
    rows = real(COUNTING)
    assert [score_of(row, COUNTING.parent, row["images"]) for row in rows] == [1.0] * len(rows)
    others = [score_of(row, COUNTING.parent, other["images"]) for row in rows for other in rows if other is not row]
    assert sum(others) / len(others) < 0.5
    blank = look(Image.new("RGB", (400, 100), "grey"))
    assert {necessity_by_rules(row["problem"], row["answer"], None, [blank]).value for row in rows} == {0.0}


def test_a_color_that_the_puzzle_leaves_out_is_not_seen():
    """The rule's blind spot: the answer is the missing square's colour, which is nowhere in the picture."""
    folder = ASSETS / "puzzlevqa"
    for row in real(folder / "dev.jsonl"):
        assert score_of(row, folder, row["images"]) == 0.0
        assert score_of({**row, "answer": "red"}, folder, row["images"]) == 1.0


@pytest.mark.parametrize(
    ("question", "answer", "value", "reason"),
    [
        ("<image>\nWhat is the color of the square?", "red", 1.0, "seen: red, square"),
        ("What is the color of the square?", "green", 0.5, "seen: square; not seen: green"),
        ("Which shape is left of the gray hexagon?", "triangle", 0.0, "not seen: grey, hexagon, triangle"),
        ("Is the larger circle blue?", "yes", 1.0, "seen: blue, circle, sizes that differ"),
        ("Is the hexagon green?", "no", UNKNOWN, "nothing that rules can see"),
        ("Who wrote the book?", "Austen", UNKNOWN, "nothing that rules can see"),
        ("How many circles are there?", "2", 1.0, "seen: 2 circles (2 counted)"),
        ("How many blue circles are in the image?", "3", 0.0, "not seen: 3 blue circles (2 counted)"),
        ("How many objects are in the picture in total?", "3", 1.0, "seen: 3 objects (3 counted)"),
        ("How many red circles are there?", "0", 1.0, "seen: 0 red circles (0 counted)"),
        ("How many circles touch the square?", "2", 1.0, "seen: circle, square"),
        ("What is 12 + 7?", "19", 0.0, "the text alone: 12 + 7 is 19"),
        ("What is 12 plus 7?", "18", UNKNOWN, "nothing that rules can see"),
        ("The red square is left of what? It is a red square.", "red square", 0.0, "the text alone names red square"),
        ("Is the square red or green?", "red", 0.666667, "seen: red, square; not seen: green"),
    ],
)
def test_a_question_and_what_is_seen_of_it(question, answer, value, reason):
    found = scored(question, answer)
    assert (found.value, found.reason) == (value, reason)


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("What colour is the square?\nA. green\nB. red\nC. pink", None),
        ("What colour is the square?\n(A) green (B) red (C) pink", None),
        ("What colour is the square?", ["green", "red", "pink"]),
    ],
)
def test_options_are_read_by_letter_and_are_no_claims(question, choices):
    assert scored(question, "B", choices=choices).reason == "seen: red, square"
    assert scored(question, "A", choices=choices).reason == "seen: square; not seen: green"


def test_blank_beats_all_and_several_pictures_are_seen_together():
    blank = look(Image.new("RGB", (99, 9), "navy"))
    assert scored("What is 1 + 1?", "3", blank).reason == "the picture is blank"
    assert scored("Who wrote the book?", "Austen", blank).value == 0.0
    assert scored("How many circles are there?", "2", SCENE, blank).value == 1.0
    assert scored("How many circles are there?", "4", SCENE, SCENE).value == 1.0


def test_outlines_are_not_counted():
    image = drawn((4, (50, 50), 30, 0, "red"), (4, (140, 140), 40, 45, "white"), outline="black")
    assert look(image).has_more and not SCENE.has_more
    assert scored("How many squares are there?", "1", look(image)).value == UNKNOWN
    assert scored("What is red?", "square", look(image)).value == 1.0


def test_shapes_of_photographs_are_not_counted():
    assert NOISE.shapes is None
    assert scored("How many circles are there?", "2", NOISE).value == UNKNOWN
    assert scored("What colour is the square?", "grey", NOISE).reason == "seen: grey"


def test_rules_need_the_ablation():
    keys = {"model_name_or_path": "m", "output_dir": "o", "dataset_name": "d", "assessment": "rules", "ablation": False}
    with pytest.raises(RecipeError, match="necessity_by"):
        build_recipe({**keys, "necessity_by": "rules"})


def test_a_run_by_rules_asks_the_model_for_chains_alone(tmp_path):
    server = ChatServer(lambda *_: "<think>So many that I count ten.</think>\n\\boxed{10}")
    keys = {"dataset_name": str(COUNTING), "images_without_marks": "prepend", "assessment": "rules"}
    keys |= {"num_revisions": 0, "ablation": True, "necessity_by": "rules"}
    model = save_random_vlm(tmp_path / "model", max_tiles=1)
    assert run(tmp_path, model, server.base_url, **keys) == 0, (tmp_path / "log.txt").read_text()
    server.close()
    examples = load_examples(str(COUNTING), images_without_marks="prepend")
    assert [request["model"] for request in server.requests] == ["writer"] * 2 * len(examples), "two chains a row"
    rows = rows_of(tmp_path)
    assert {row["sub_scores"]["necessity_by_rules"]["value"] for row in rows} == {1.0}
    assert rows[0]["sub_scores"]["necessity_by_rules"]["reason"] == "seen: 1 black squares (1 counted)"
    assert {row["sub_scores"]["necessity_by_ablation"] for row in rows} == {None}
    for row in rows:
        assert row["vision"] == pytest.approx((row["sub_scores"]["clarity"]["value"] + 1.0) / 2)
    kept = rows_of(tmp_path, "dataset.parquet")
    assert [row["distill"]["necessity_by_rules"] for row in kept] == [1.0, 1.0]
