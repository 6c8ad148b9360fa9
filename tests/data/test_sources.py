"""Data sets from files and folders of every published layout, and drawn ones."""

import json

import datasets
import pytest
from PIL import Image

from r1v_rl.config import DataConfig
from r1v_rl.data.dataset import MappedExamples, load_configured_examples, load_examples
from r1v_rl.data.images import load_image
from r1v_rl.errors import DataError, RecipeError

RED = Image.new("RGB", (8, 8), "red")
BLUE = Image.new("RGB", (8, 8), "blue")
TEXT, IMAGE = (lambda text: {"type": "text", "text": text}), {"type": "image"}
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
