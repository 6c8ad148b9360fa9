"""How long a prompt is with its images: the fast count equals the processor's own, and too long a row is refused."""

import pytest
from PIL import Image
from random_vlm import TILE, picture, random_vlm

from r1v_rl.data.chat import (
    check_prompt_lengths,
    count_prompt_tokens,
    limit_image_tiles,
    prompt_text,
    prompt_token_counter,
)
from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.types import Example


@pytest.fixture(scope="module")
def processor():
    return random_vlm(max_tiles=6)[1]


def rows() -> list[Example]:
    """Text, one picture of each shape (1 to 6 tiles), several at once."""
    shapes = [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (5, 1)]
    pictures = [picture(i, width * TILE, height * TILE + 3) for i, (width, height) in enumerate(shapes)]
    problems = [
        ("count the red", []),
        *(("<image>\nsum", [p]) for p in pictures),
        ("<image><image>\n<image>?", pictures[:3]),
    ]
    return examples_from_rows([{"problem": text, "answer": "1", "images": images} for text, images in problems])


def test_the_fast_count_is_the_exact_one(processor):
    count = prompt_token_counter(processor)
    exact = [count_prompt_tokens(processor, example) for example in rows()]
    assert [count(example) for example in rows()] == exact
    assert len(set(exact)) >= 5  # the pictures do differ in their tiles


def test_a_processor_whose_arithmetic_is_wrong_is_not_believed(processor, monkeypatch):
    """For example one whose prediction forgets the tokens around an image."""
    right = type(processor)._get_num_multimodal_tokens

    def wrong(self, image_sizes=None, **kwargs):
        data = right(self, image_sizes=image_sizes, **kwargs)
        data.num_image_tokens = [number - 2 for number in data.num_image_tokens]
        return data

    exact = [count_prompt_tokens(processor, example) for example in rows()]
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", wrong)
    count = prompt_token_counter(processor)
    assert [count(example) for example in rows()] == exact


def test_the_processor_is_asked_for_height_before_width(processor, monkeypatch):
    asked = []
    real = type(processor)._get_num_multimodal_tokens

    def spy(self, image_sizes=None, **kwargs):
        asked.extend(image_sizes)
        return real(self, image_sizes=image_sizes, **kwargs)

    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", spy)
    (example,) = examples_from_rows([{"problem": "<image>?", "answer": "1", "image": picture(0, 96, 40)}])
    prompt_token_counter(processor)(example)
    assert set(asked) == {(40, 96)}


def test_a_picture_turned_by_exif_is_counted_as_it_is_shown(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 3 * TILE, TILE).save(tmp_path / "turned.png", exif=exif)
    (example,) = examples_from_rows([{"problem": "<image>?", "answer": "1", "image": str(tmp_path / "turned.png")}])
    assert prompt_token_counter(processor)(example) == count_prompt_tokens(processor, example)


def test_the_longest_prompt_is_returned_and_one_above_the_context_refused(processor):
    longest = max(count_prompt_tokens(processor, example) for example in rows())
    assert check_prompt_lengths(rows(), processor, max_model_len=longest + 10, max_completion_length=10) == longest
    message = rf"prompt has {longest} tokens, \d image\(s\) included, and `max_completion_length` is 11: together above"
    with pytest.raises(DataError, match=rf"row \d+: its {message} the context of {longest + 10}"):
        check_prompt_lengths(rows(), processor, max_model_len=longest + 10, max_completion_length=11)


def test_a_placeholder_spelled_out_in_a_row_is_refused(processor):
    (example,) = examples_from_rows([{"id": "x", "problem": f"{processor.image_token} red", "answer": "1"}])
    with pytest.raises(DataError, match=r"row x: the chat template writes 1 image placeholder\(s\) .* for 0 image"):
        prompt_text(processor, example)


def test_fewer_tiles_make_shorter_prompts():
    processor = random_vlm(max_tiles=6)[1]
    many = [count_prompt_tokens(processor, example) for example in rows()]
    limit_image_tiles(processor, None)
    assert [count_prompt_tokens(processor, example) for example in rows()] == many
    limit_image_tiles(processor, 1)
    few = [count_prompt_tokens(processor, example) for example in rows()]
    assert few[0] == many[0]
    assert max(few[1:-1]) < max(many[1:-1])
    count = prompt_token_counter(processor)
    assert [count(example) for example in rows()] == few


def test_a_limit_on_tiles_needs_a_processor_that_cuts():
    class Plain:
        image_processor = object()

    with pytest.raises(
        RecipeError, match="`max_image_tiles` is for processors that cut images into tiles, which object"
    ):
        limit_image_tiles(Plain(), 4)
