"""Rows of the training set that are test rows: by words, by picture, and what is not mistaken for one."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from r1v_rl.data.contamination import (
    check_contamination,
    find_duplicates,
    find_overlaps,
    is_near_picture,
    picture_hash,
    words,
)
from r1v_rl.data.dataset import examples_from_rows, load_examples
from r1v_rl.errors import DataError

QUESTION = "A train leaves the station at nine and arrives after four hours; how many kilometres did it go at 80 km/h?"
OTHER = (
    "A baker sells nine loaves in the morning and four in the evening; what is left of his 80 loaves when he closes?"
)


def drawing(seed: int, size=(300, 200)) -> Image.Image:
    """A few coloured boxes and discs."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, side = rng.integers(0, 200), rng.integers(0, 120), rng.integers(30, 80)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        (pen.ellipse if rng.integers(2) else pen.rectangle)((x, y, x + side, y + side), fill=colour)
    return image


def stored(image: Image.Image, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **how)
    return buffer.getvalue()


def rows(*pairs, prefix: str):
    """(question, picture or None[, answer]) -> examples."""
    made = []
    for number, (question, image, *answer) in enumerate(pairs):
        marks = {"images": [image], "problem": f"<image>\n{question}"} if image is not None else {"problem": question}
        made.append({"id": f"{prefix}{number}", "answer": (answer or ["1"])[0], **marks})
    return examples_from_rows(made, instruction="Think step by step and put the final answer in a box.")


def found(train, test):
    return [(o.train_id, o.test_id, o.kind, o.exact_picture) for o in find_overlaps(train, test, progress=False)]


def test_words_are_folded_and_operators_count():
    assert words("Compute $2^{3}-1$, \uff21BC \u4f60\u597d!") == [
        "compute", "2", "^", "3", "-", "1", "abc", "\u4f60", "\u597d", "!",
    ]  # fmt: skip
    assert words("2+3") != words("2-3")


def test_the_same_question_with_other_spelling_and_setting():
    train = rows((OTHER, None), (f"Solve this for me:  {QUESTION.upper()} Show your work.", None), prefix="t")
    (overlap,) = find_overlaps(train, rows((QUESTION, None), prefix="e"), progress=False)
    assert (overlap.train_id, overlap.test_id, overlap.kind, overlap.text_share) == ("t1", "e0", "text", 1.0)


def test_most_of_the_words_are_enough_and_three_quarters_are_not():
    text = QUESTION.split()
    train = rows((" ".join(text[:-2]), None), (" ".join(text[: 3 * len(text) // 4]), None), prefix="t")
    assert found(train, rows((QUESTION, None), prefix="e")) == [("t0", "e0", "text", False)]


def test_a_short_question_must_be_the_whole_text():
    train = rows(("What is 2+3?", None), ("What is 2-3?", None), ("What is 2+3+4?", None), prefix="t")
    assert found(train, rows(("what is $2+3$", None), prefix="e")) == [("t0", "e0", "text", False)]


def test_the_wording_of_a_whole_set_proves_nothing():
    template = "How many of the coloured things in this drawing of the old harbour are {}?"
    test = rows(*((template.format(c), None) for c in ("red", "blue", "grey", "green", "pink")), prefix="e")
    assert found(rows((template.format("heavy"), None), prefix="t"), test) == []
    assert [o[1] for o in found(rows((template.format("blue"), None), prefix="t"), test)] == ["e1"]


def test_a_picture_decides_where_both_rows_have_one():
    picture, other = drawing(0), drawing(1)
    test = rows((QUESTION, picture), prefix="e")
    jpeg = stored(picture.resize((600, 400)), format="JPEG", quality=80)
    train = rows(
        (QUESTION, other), (OTHER, stored(picture, format="PNG")), (QUESTION, jpeg), (QUESTION, None), (OTHER, None),
        prefix="t",
    )  # fmt: skip
    assert found(train, test) == [
        ("t1", "e0", "picture", True),
        ("t2", "e0", "picture and text", False),
        ("t3", "e0", "text", False),
    ]


@pytest.mark.parametrize("how", [{"format": "JPEG", "quality": 50}, {"format": "WEBP", "quality": 60}])
def test_a_picture_stored_anew_is_the_same(how):
    for seed in range(5):
        picture = drawing(seed)
        again, small = picture_hash(stored(picture, **how)), picture_hash(picture.resize((150, 100)))
        assert is_near_picture(picture_hash(picture), again) and is_near_picture(small, picture_hash(picture))
        assert again.exact != picture_hash(picture).exact
        others = [picture_hash(drawing(s)) for s in range(5) if s != seed]
        assert not any(is_near_picture(again, other) for other in others)


def test_one_object_more_is_another_picture_and_a_longer_one_too():
    picture, more = drawing(3), drawing(3)
    ImageDraw.Draw(more).rectangle((250, 150, 290, 190), fill="black")
    assert not is_near_picture(picture_hash(picture), picture_hash(more))
    assert not is_near_picture(picture_hash(picture), picture_hash(picture.resize((300, 300))))


def test_pictures_of_a_series_with_other_answers_are_other_items():
    """They differ by a hair, are asked the same, and it is the hair that is asked about."""
    one, two = drawing(4, (900, 600)), drawing(4, (900, 600))
    two.putpixel((880, 590), (0, 0, 0))
    test = rows((QUESTION, one, "7"), prefix="e")
    assert found(rows((QUESTION, two, "8"), prefix="t"), test) == []
    assert found(rows((QUESTION, two, "7"), prefix="t"), test) == [("t0", "e0", "picture and text", False)]


def test_duplicates_within_a_set():
    picture = drawing(5)
    again = stored(picture, format="JPEG", quality=80)
    examples = rows(
        (QUESTION, None), (QUESTION, picture), (OTHER, picture), (f"{QUESTION} Explain.", None), (QUESTION, again),
        (QUESTION, drawing(6)), (OTHER, None), (f"{QUESTION} Explain.", again), prefix="d",
    )  # fmt: skip
    assert find_duplicates(examples, progress=False) == [(3, 0), (4, 1), (7, 1)]
    other_answers = [replace(example, answer=str(i)) for i, example in enumerate(examples)]
    assert find_duplicates(other_answers, progress=False) == []


def test_scenes_of_the_two_splits_share_nothing():
    train = load_examples("scenes", split="train", dataset_size=600)
    test = load_examples("scenes", split="heldout", dataset_size=150)
    assert find_overlaps(train, test, progress=False) == []


def test_what_a_run_says_and_refuses():
    train, test = rows((OTHER, None), (QUESTION, None), prefix="t"), rows((QUESTION, None), prefix="e")
    line = check_contamination(train, test, "warn")
    assert line.startswith("1 of 2 training rows overlap with 1 of 1 test rows (1 by text): t1 is e0 (text); drop")
    with pytest.raises(DataError, match=r"t1 is e0.*`contamination_check: warn`"):
        check_contamination(train, test, "refuse")
    assert check_contamination(train[:1], test, "refuse") == "none of 1 training rows is one of 1 test rows"
    assert check_contamination(train, test, "off").startswith("not looked for")
