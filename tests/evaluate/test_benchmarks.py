"""Every benchmark is read from its published layout, asked as R1V asks, and its own gold answers are right."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_layouts import ROWS, encoded, make_all

from r1v_rl.data.images import load_image
from r1v_rl.errors import DataError
from r1v_rl.evaluate.accuracy import judge_responses
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.benchmarks.base import Question, _row, load_benchmark, prompt_of
from r1v_rl.evaluate.gold import check_golds
from r1v_rl.evaluate.prompts import DIRECT, Instructions
from r1v_rl.scoring.judging import question_text

PLAIN = Instructions("CHOICE", "OPEN")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("hub"))


def load(name, root, **settings):
    return load_benchmark(BENCHMARKS[name], PLAIN, root=str(root), **settings)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "aime2025"])
def test_own_gold_is_right_and_anothers_is_wrong(name, root):
    examples = load(name, root, size=20 if name == "scenes" else None)
    found = check_golds(examples, timeout_s=10.0)
    assert (found.num_items, found.refused, found.accepted) == (len(examples), [], [])
    assert found.num_others == len(examples) >= 2, found
    assert all(load_image(source).width > 1 for example in examples for source in example.images)


def test_a_gold_that_cannot_be_right_is_reported(root):
    (example, *_) = load("math500", root)
    faulty = type(example)(example.id, example.messages, (), "", {**example.columns, "accepted_answers": ["\\frac{1"]})
    found = check_golds([faulty], timeout_s=10.0)
    assert len(found.refused) == 1 and "own gold right 0 of 1" in str(found)


def test_what_is_asked(root):
    """A picture on its own line, the question, options one a line, the instruction; as published, without its marks."""
    example = load("puzzlevqa", root)[0]
    assert example.messages[0]["content"][0] == {"type": "image"} and len(example.images) == 1
    assert question_text(example) == f"<image>\n{ROWS['puzzlevqa'][0]['problem']}\nA. 4\nB. 2\nC. 5\nD. 6\n\nCHOICE"
    assert example.answer == "B"
    vision = load("mathvision", root)[1]
    assert question_text(vision).startswith("<image>\nOn this monthly calendar") and "<image1>" not in question_text(
        vision
    )
    mathvista = load("mathvista", root)
    assert "Give a number rounded to 1 decimal place(s)." in question_text(mathvista[0])
    assert question_text(mathvista[0]).endswith("\n\nOPEN") and question_text(mathvista[1]).endswith("\n\nCHOICE")
    assert load("gsm8k", root)[0].answer == ROWS["gsm8k"][0]["answer"]


def test_mmmu_places_pictures_where_its_text_has_them(root):
    by_id = {example.id: example for example in load("mmmu", root)}
    assert list(by_id) == sorted(by_id)  # subject by subject
    music = by_id["validation_Music_6"]
    kinds = [block["type"] for block in music.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"] and len(music.images) == 2
    pixels = [load_image(source).tobytes() for source in music.images]
    assert pixels == [load_image(encoded(seed)).tobytes() for seed in (90, 21)]  # in the order of the text
    assert by_id["validation_Architecture_and_Engineering_7"].columns["group"] == "Architecture_and_Engineering"


def test_names_of_pictures_that_a_row_does_not_have_stay_words():
    """As in MMMU's validation_Math_7, whose options name 24 pictures beyond the seven that are published."""
    choices = ["<image 2>, <image 8>", "<image 9>"]
    several = _row(Question("1", "See <image 1>.", "A", "choice", choices, images=["a.png", "b.png"]), None, PLAIN)
    assert several["prompt"] == "See <image>.\nA. <image>, [image 8]\nB. [image 9]\n\nCHOICE"
    assert several["images"] == ["a.png", "b.png"]
    one = _row(
        Question("1", "See <image 1>.", "A", "choice", ["<image 1>", "<image 2>"], images=["a.png"]), None, PLAIN
    )
    assert one["prompt"] == "<image>\nSee .\nA. [image 1]\nB. [image 2]\n\nCHOICE" and one["images"] == ["a.png"]


def test_any_of_several_gold_answers_is_right(root):
    tampa = next(example for example in load("mmmu", root) if example.id == "validation_Geography_4")
    said = [f"\\boxed{{{text}}}" for text in ("Tampa", "Florida", "Miami")]
    verdicts = judge_responses([tampa] * 3, said, answer_kind="math", timeout_s=10.0)
    assert [verdict.correct for verdict in verdicts] == [True, True, False]


def test_gpqa_orders_options_by_the_row_and_knows_where_the_right_one_went(root):
    examples = load("gpqa_diamond", root)
    assert len({example.answer for example in examples}) > 1 and [e.id for e in examples] == [
        f"rec{i}" for i in range(6)
    ]
    for number, example in enumerate(examples):
        assert example.columns["choices"]["ABCD".index(example.answer)] == f"{number} m"
    assert [e.answer for e in load("gpqa_diamond", root)] == [e.answer for e in examples]


def test_a_line_that_asks_for_the_bare_letter_is_dropped():
    question = Question(
        "1", "Which one?\nAnswer with the option's letter from the given choices directly.", "A", "choice", ["x", "y"]
    )
    assert prompt_of(question, PLAIN) == "Which one?\nA. x\nB. y\n\nCHOICE"
    assert prompt_of(question, Instructions("", "")) == "Which one?\nA. x\nB. y"
    assert "step by step" not in prompt_of(question, DIRECT) and "step by step" in prompt_of(question, Instructions())


def test_a_set_in_several_files_is_read_whole(tmp_path):
    (tmp_path / "main").mkdir()
    for part in range(2):
        rows = [{"question": f"{part} + {i}?", "answer": f"#### {part + i}"} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "main" / f"test-0000{part}-of-00002.parquet")
    examples = load_benchmark(BENCHMARKS["gsm8k"], PLAIN, path=str(tmp_path))
    assert [example.id for example in examples] == [str(i) for i in range(6)]
    assert [example.answer for example in examples] == ["0", "1", "2", "1", "2", "3"]


def test_a_file_a_folder_and_what_is_missing(root, tmp_path):
    path = str(root / "MATH-500" / "test.jsonl")
    assert len(load_benchmark(BENCHMARKS["math500"], PLAIN, path=path)) == 3
    assert len(load("math500", root, size=2)) == 2
    with pytest.raises(DataError, match="holds none of math500, MATH-500; put it there"):
        load("math500", tmp_path)
    (tmp_path / "math500.jsonl").write_text('{"problem": "1+1?"}\n')
    with pytest.raises(DataError, match=r"row 0 is not as it is published .*'answer'.*columns problem"):
        load_benchmark(BENCHMARKS["math500"], PLAIN, path=str(tmp_path / "math500.jsonl"))
