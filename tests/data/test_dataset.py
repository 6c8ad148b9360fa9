"""Rows of every common shape become the same example; rows that cannot be used are refused by their id."""

import json

import datasets
import pytest
from PIL import Image

from r1v_rl.config import DataConfig
from r1v_rl.data.dataset import MappedExamples, examples_from_rows, load_configured_examples, load_examples
from r1v_rl.data.images import load_image
from r1v_rl.errors import DataError, RecipeError

RED = Image.new("RGB", (8, 8), "red")
BLUE = Image.new("RGB", (8, 8), "blue")
TEXT, IMAGE = (lambda text: {"type": "text", "text": text}), {"type": "image"}


def one(row: dict, **settings):
    (example,) = examples_from_rows([row], **settings)
    return example


def user(*blocks) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}]


# --- rows -----------------------------------------------------------------------------------------------------------


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


# --- files ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "problem": "<image>Colour?", "answer": "red", "images": ["images/red.png"]},
    {"id": "b", "problem": "1 + 1?", "answer": "2", "images": []},
]


@pytest.fixture
def folder(tmp_path):
    """`images/red.png` and nothing else."""
    (tmp_path / "images").mkdir()
    RED.save(tmp_path / "images" / "red.png")
    return tmp_path


def write_jsonl(path, rows=ROWS, head=b""):
    path.write_bytes(head + "\n".join(json.dumps(row) for row in rows).encode())
    return str(path)


def check_rows(examples):
    assert [(example.id, example.answer, len(example.images)) for example in examples] == [
        ("a", "red", 1),
        ("b", "2", 0),
    ]
    assert load_image(examples[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert examples[-1].id == "b"
    assert [example.id for example in examples[:1]] == ["a"]


def test_jsonl(folder):
    check_rows(load_examples(write_jsonl(folder / "train.jsonl")))


def test_jsonl_with_a_byte_order_mark_and_blank_lines(folder):
    path = write_jsonl(folder / "train.jsonl", head=b"\xef\xbb\xbf")
    with open(path, "a") as file:
        file.write("\n\n")
    check_rows(load_examples(path))


def test_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    check_rows(load_examples(str(folder / "rows.json")))


def test_csv(folder):
    lines = ["id,problem,answer,images", 'a,<image>Colour?,red,"[""images/red.png""]"', "b,1 + 1?,2,"]
    (folder / "rows.csv").write_text("\n".join(lines))
    check_rows(load_examples(str(folder / "rows.csv")))


def test_parquet_is_read_from_disk_row_by_row(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    examples = load_examples(str(folder / "rows.parquet"))
    assert isinstance(examples, MappedExamples)
    check_rows(examples)


def with_pictures() -> datasets.Dataset:
    """As the hub stores it: encoded pictures inside the table."""
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [{**row, "images": [RED for _ in row["images"]]} for row in ROWS]
    return datasets.Dataset.from_list(rows, features=features)


def test_parquet_with_pictures_inside(folder):
    with_pictures().to_parquet(folder / "rows.parquet")
    examples = load_examples(str(folder / "rows.parquet"))
    check_rows(examples)
    assert isinstance(examples[0].images[0], bytes)  # still encoded


def test_save_to_disk_folders(tmp_path):
    with_pictures().save_to_disk(tmp_path / "one")
    check_rows(load_examples(str(tmp_path / "one")))
    datasets.DatasetDict({"train": with_pictures()}).save_to_disk(tmp_path / "splits")
    check_rows(load_examples(str(tmp_path / "splits")))
    with pytest.raises(DataError, match="has the splits train, not test"):
        load_examples(str(tmp_path / "splits"), split="test")


def test_folder_with_one_file_a_split(folder):
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", ROWS[1:])
    check_rows(load_examples(str(folder)))
    assert [example.id for example in load_examples(str(folder), split="test")] == ["b"]
    with pytest.raises(DataError, match=r"holds no dataset: expected .* dev\.jsonl"):
        load_examples(str(folder), split="dev")


def test_folder_of_parquet_shards_as_on_the_hub(folder):
    (folder / "data").mkdir()
    for number in range(2):
        datasets.Dataset.from_list(ROWS[number : number + 1]).to_parquet(
            folder / f"data/train-0000{number}-of-00002.parquet"
        )
    check_rows(load_examples(str(folder)))


def test_folder_of_pictures_with_metadata(folder):
    rows = [{"id": "a", "problem": "<image>Colour?", "answer": "red", "file_name": "images/red.png"}, ROWS[1]]
    write_jsonl(folder / "metadata.jsonl", rows)
    check_rows(load_examples(str(folder)))


def test_dataset_root_is_where_images_start_and_what_they_may_not_leave(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("rows")
    path = write_jsonl(elsewhere / "train.jsonl")
    with pytest.raises(
        DataError, match=r"row a: image .*red\.png does not exist; relative paths start at `dataset_root`"
    ):
        load_examples(path)
    check_rows(load_examples(path, dataset_root=folder))
    absolute = [{**ROWS[0], "images": [str(folder / "images/red.png")]}, ROWS[1]]
    path = write_jsonl(elsewhere / "absolute.jsonl", absolute)
    check_rows(load_examples(path, dataset_root=folder))
    with pytest.raises(DataError, match=r"row a: image .* lies outside"):
        load_examples(path)
    with pytest.raises(DataError, match="`dataset_root` must be a folder"):
        load_examples(path, dataset_root=folder / "no")


def test_a_damaged_image_is_refused_once_for_each_row_that_names_it(folder):
    (folder / "images" / "red.png").write_bytes((folder / "images" / "red.png").read_bytes()[:-5])
    rows = [ROWS[0], {**ROWS[0], "id": "c"}]
    with pytest.raises(DataError, match=r"(?s)2 row\(s\).*row a: image .*red\.png is damaged.*row c: image"):
        load_examples(write_jsonl(folder / "train.jsonl", rows))


def test_bad_lines_are_named_by_their_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "?", "answer": "1"}\n{"problem": \n\n[1]\n')
    with pytest.raises(
        DataError, match=r"(?s)rows\.jsonl:2: not JSON.*rows\.jsonl:4: a row is a JSON object, received list"
    ):
        load_examples(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "Füße".encode("latin-1"), "must be UTF-8 text"),
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"{}", "expected a list of objects"),
        ("a.json", b"[", "not JSON"),
        ("a.csv", b"problem,answer\n1,2,3\n", r"a\.csv:2: .*not as many cells"),
        ("a.csv", b"problem,images\nx,[1\n", "must be a path or a JSON list"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("a.txt", b"x", r"must end in one of \.jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / name))


def test_a_name_that_leads_nowhere_says_what_was_tried(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist; set `dataset_name`"):
        load_examples(str(tmp_path / "missing.jsonl"))
    with pytest.raises(
        DataError, match=r"neither one of ours \(scenes\) nor a local path, and the hub does not give it"
    ):
        load_examples("nobody/nothing")
    with pytest.raises(RecipeError, match="must set `dataset_name`"):
        load_examples(None)


# --- scenes and sizes -----------------------------------------------------------------------------------------------


def test_scenes_are_drawn_from_the_seed():
    first, again, other = (load_examples("scenes", dataset_size=6, seed=seed) for seed in (1, 1, 2))
    assert [example.messages for example in first] == [example.messages for example in again]
    assert [example.messages for example in first] != [example.messages for example in other]
    assert all(example.answer for example in first)


def test_arguments_of_scenes_reach_it():
    examples = load_examples("scenes", dataset_size=5, dataset_kwargs={"num_images": 2})
    assert [len(example.images) for example in examples] == [2] * 5
    with pytest.raises(DataError, match=r"`dataset_kwargs` .* does not fit `scenes`"):
        load_examples("scenes", dataset_size=5, dataset_kwargs={"colour": "red"})
    with pytest.raises(DataError, match="`dataset_kwargs` is for scenes only"):
        load_examples("rows.jsonl", dataset_kwargs={"num_images": 2})


@pytest.mark.parametrize(("size", "limit", "expected"), [(None, None, 2), (1, None, 1), (None, 1, 1), (5, 5, 2)])
def test_size_and_limit(folder, size, limit, expected):
    path = write_jsonl(folder / "train.jsonl")
    assert len(load_examples(path, dataset_size=size, limit=limit)) == expected
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    assert len(load_examples(str(folder / "rows.parquet"), dataset_size=size, limit=limit)) == expected


def test_a_recipes_keys_reach_the_loader(folder):
    config = DataConfig(
        dataset_name=write_jsonl(folder / "train.jsonl", [{"task": "?", "answer": "1", "image": "images/red.png"}]),
        dataset_prompt_column="task",
        images_without_marks="prepend",
        system_prompt="Think.",
        instruction="Count.",
    )
    (example,) = load_configured_examples(config)
    assert [message["role"] for message in example.messages] == ["system", "user"]
    assert example.messages[1]["content"] == [IMAGE, TEXT("? Count.")]
