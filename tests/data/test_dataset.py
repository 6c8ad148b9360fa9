"""Rows of every common shape become the same example; rows that cannot be used are refused by their id."""

import pytest
from PIL import Image

from r1v_rl.data.dataset import examples_from_rows, rows_sha256
from r1v_rl.errors import DataError

RED = Image.new("RGB", (8, 8), "red")
BLUE = Image.new("RGB", (8, 8), "blue")
TEXT, IMAGE = (lambda text: {"type": "text", "text": text}), {"type": "image"}


def one(row: dict, **settings):
    (example,) = examples_from_rows([row], **settings)
    return example


def user(*blocks) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize("prompt", ["prompt", "problem", "question", "query", "messages", "conversations"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth", "label"])
@pytest.mark.parametrize("images", ["images", "image"])
def test_columns_may_have_any_known_name(prompt, answer, images):
    example = one({"id": "a", prompt: "<image>How many?", answer: "3", images: RED})
    assert example.messages == user(IMAGE, TEXT("How many?"))
    assert (example.id, example.answer, example.images) == ("a", "3", (RED,))


@pytest.mark.parametrize(
    "prompt",
    [
        "Look: <image> and <image>?",
        [{"role": "user", "content": "Look: <image> and <image>?"}],
        [{"from": "human", "value": "Look: <image> and <image>?"}],
        [{"role": "user", "content": [TEXT("Look: "), IMAGE, TEXT(" and "), IMAGE, TEXT("?")]}],
        [{"role": "user", "content": [TEXT("Look: <image> and "), {"type": "image", "text": None}, "?"]}],
        [{"role": "user", "content": "Look: <image> and <image>?"}, {"role": "assistant", "content": "dropped"}],
    ],
)
def test_every_form_of_prompt_becomes_the_same_blocks(prompt):
    example = one({"prompt": prompt, "answer": "1", "images": [RED, BLUE]})
    assert example.messages == user(TEXT("Look: "), IMAGE, TEXT(" and "), IMAGE, TEXT("?"))
    assert example.images == (RED, BLUE)


def test_images_may_stand_in_their_blocks():
    blocks = [{"type": "image", "image": RED}, TEXT("Which?"), {"type": "image", "image": BLUE}]
    example = one({"prompt": user(*blocks), "answer": "1"})
    assert example.images == (RED, BLUE)
    assert example.messages == user(IMAGE, TEXT("Which?"), IMAGE)


def test_text_one_image_and_many_stand_in_one_dataset():
    rows = [
        {"problem": "1 + 1?", "answer": 2, "images": []},
        {"problem": "1 + 1?", "answer": 2.5, "images": None},
        {"problem": "<image>", "answer": True, "images": [RED]},
        {"problem": "<image><image><image>?", "answer": "x", "images": [RED, BLUE, RED]},
    ]
    examples = examples_from_rows(rows)
    assert [len(example.images) for example in examples] == [0, 0, 1, 3]
    assert [example.answer for example in examples] == ["2", "2.5", "True", "x"]
    assert [example.id for example in examples] == ["0", "1", "2", "3"]


def test_the_system_prompt_goes_first_and_gives_way_to_the_rows_own():
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    first, second = examples_from_rows(
        [{"prompt": "?", "answer": "1"}, {"prompt": own, "answer": "1"}], system_prompt="Think."
    )
    assert first.messages == [{"role": "system", "content": [TEXT("Think.")]}, *user(TEXT("?"))]
    assert second.messages == [{"role": "system", "content": [TEXT("Be brief.")]}, *user(TEXT("?"))]


def test_the_instruction_follows_the_last_question():
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (example,) = examples_from_rows(
        [{"prompt": [*turns, {"role": "user", "content": "2 + 2? "}], "answer": "4"}], instruction="Think."
    )
    assert [message["content"] for message in example.messages] == [
        [TEXT("1 + 1?")],
        [TEXT("2")],
        [TEXT("2 + 2? Think.")],
    ]
    (shown,) = examples_from_rows([{"prompt": "<image>", "images": [RED], "answer": "1"}], instruction="Think.")
    assert shown.messages[0]["content"] == [IMAGE, TEXT("Think.")]


def test_a_conversation_without_answer_column_ends_with_the_answer():
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert one({"conversations": turns}).answer == "4"
    assert one({"conversations": turns, "answer": "5"}).answer == "5"
    history = [*turns, {"from": "human", "value": "And 3 + 3?"}, {"from": "gpt", "value": "6"}]
    assert [message["role"] for message in one({"conversations": history}).messages] == ["user", "assistant", "user"]


def test_rewards_get_every_column_but_images():
    row = {"id": 7, "problem": "<image>?", "solution": "3", "image": RED, "choices": ["1", "3"], "prompt": "<image>!"}
    assert one(row).columns == {
        "id": "7",
        "problem": "<image>?",
        "solution": "3",
        "answer": "3",
        "choices": ["1", "3"],
    }


def test_images_without_marks_may_be_put_first():
    rows = [
        {"prompt": "Which?", "answer": "1", "images": [RED, BLUE]},
        {"prompt": "a <image> b", "answer": "1", "image": RED},
    ]
    plain, marked = examples_from_rows(rows, images_without_marks="prepend")
    assert plain.messages == user(IMAGE, IMAGE, TEXT("Which?"))
    assert marked.messages == user(TEXT("a "), IMAGE, TEXT(" b"))


def test_the_prompt_column_can_be_named():
    assert one({"task": "?", "prompt": "no", "answer": "1"}, prompt_column="task").messages == user(TEXT("?"))


def test_an_answer_may_be_missing_where_no_reward_reads_it():
    assert one({"prompt": "?"}, answer_required=False).answer is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"problem": "?", "answer": "1", "images": [RED]},
            r"0 `<image>` mark.* 1 image.*images_without_marks: prepend",
        ),
        ({"problem": "<image>?", "answer": "1"}, r"1 `<image>` mark.* 0 image.*write it differently"),
        ({"problem": "<image>?", "answer": "1", "images": []}, r"1 `<image>` mark.* 0 image"),
        ({"problem": "<image><image>?", "answer": "1", "images": [RED]}, r"2 `<image>` mark.* 1 image"),
        ({"problem": "<image>?", "answer": "1", "images": [RED, BLUE]}, r"1 `<image>` mark.* 2 image"),
        ({"problem": "?", "answer": ""}, r"the answer is empty; fill one of the columns answer"),
        ({"problem": "?", "answer": " \n"}, r"the answer is empty"),
        ({"problem": "?", "answer": None}, r"the answer is empty"),
        ({"problem": "?", "answer": float("nan")}, r"the answer is empty"),
        ({"problem": "?"}, r"the answer is empty"),
        ({"problem": "?", "answer": ["A"]}, r"the answer must be text or a number, received list"),
        ({"problem": "", "answer": "1"}, r"the prompt is empty"),
        ({"problem": "  ", "answer": "1"}, r"the prompt is empty"),
        ({"messages": [], "answer": "1"}, r"the prompt is empty"),
        ({"messages": [{"role": "system", "content": "x"}], "answer": "1"}, r"must end with a message of the user"),
        ({"messages": [{"role": "tool", "content": "x"}], "answer": "1"}, r"role 'tool'; known are system"),
        ({"messages": [{"role": "user", "content": 3}], "answer": "1"}, r"content must be text or a list of blocks"),
        ({"messages": user({"type": "video"}), "answer": "1"}, r"type text or image, received 'video'"),
        ({"prompt": 3, "answer": "1"}, r"the prompt must be text or a list of messages, received int"),
        ({"text": "?", "answer": "1"}, r"no prompt: it has the columns id, text, answer.*dataset_prompt_column"),
        ({"problem": "?", "answer": "1", "completions": 2}, r"column `completions` has the name of a reward"),
        (
            {"problem": "<image>?", "answer": "1", "images": [3]},
            r"an image must be a path, encoded bytes or a PIL image",
        ),
        (
            {"problem": "<image>?", "answer": "1", "image": b"no picture"},
            r"image \(10 bytes\) is not an image of a known",
        ),
        ({"problem": "<image>?", "answer": "1", "image": "http://a.b/c.png"}, r"images are never fetched"),
    ],
)
def test_a_bad_row_is_refused_by_its_id(row, message):
    with pytest.raises(DataError, match=rf"row geo/7: .*{message}"):
        examples_from_rows([{"id": "geo/7", **row}])


def test_the_hash_of_rows_is_of_all_that_they_say(tmp_path):
    RED.save(tmp_path / "a.png")
    row = {"id": "a", "prompt": "<image>?", "answer": "1", "choices": ["1", "2"], "images": RED}

    def hashed(**changes):
        return rows_sha256([one({**row, **changes}, image_root=tmp_path)])

    hashes = [hashed(), hashed(images=BLUE), hashed(choices=["1", "3"]), hashed(answer="2"), hashed(images="a.png")]
    Image.new("RGB", (9, 50), "blue").save(tmp_path / "a.png")
    hashes.append(hashed(images="a.png"))
    assert len(set(hashes)) == 6 and hashed(images="a.png") == hashes[-1] and hashed() == hashes[0]


def test_duplicate_ids_are_refused():
    rows = [{"id": name, "prompt": "?", "answer": "1"} for name in ("a", "b", "a")]
    with pytest.raises(DataError, match="row a: rows 0 and 2 share this id"):
        examples_from_rows(rows)


def test_the_first_faults_are_shown_and_all_are_counted():
    rows = [{"id": f"r{i}", "prompt": "?", "answer": "" if i % 2 else "1"} for i in range(20)]
    with pytest.raises(DataError) as raised:
        examples_from_rows(rows)
    text = str(raised.value)
    assert "10 row(s) cannot be used" in text
    assert all(f"row r{i}:" in text for i in (1, 3, 5, 7, 9))
    assert "row r11:" not in text
    assert "... and 5 more rows" in text
