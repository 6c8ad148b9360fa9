"""The tiny tokenizer loses nothing of what the task says, and its template writes text and pictures alike."""

from random import Random

import pytest

from r1v_rl.data.scene_chains import careful_completion, description, look_up
from r1v_rl.data.scenes import scene_item
from r1v_rl.tiny.lessons import sample_lesson, written_prompt
from r1v_rl.tiny.tokenizer import DIRECT_TEMPLATE, END, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_text_of_the_task_round_trips_without_unknown_words(tokenizer):
    for i in range(400):
        item = scene_item("train", 0, i, num_images=0)
        for text in (
            item.problem,
            careful_completion(item.question, item.scenes) + END,
            description(item.scenes),
            *look_up(item.scenes, Random(i)),
        ):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


def test_box_thinking_marks_and_numbers_are_single_tokens(tokenizer):
    text = "Look a1 .</think>\n\\boxed{12}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Look", " a1", " .", "</think>", "\n", "\\boxed{", "12", "}"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for number in range(61):
        assert len(tokenizer(f"{number} {number}")["input_ids"]) == 2


def test_a_careful_chain_fits_its_budget(tokenizer):
    longest = {1: 0, 2: 0}
    for i in range(1000):
        item = scene_item("train", 0, i)
        ids = tokenizer(careful_completion(item.question, item.scenes) + END)["input_ids"]
        longest[len(item.scenes)] = max(longest[len(item.scenes)], len(ids))
    assert longest[1] <= 68 and longest[2] <= 84


def test_the_prompt_opens_thinking_and_the_direct_template_does_not(tokenizer):
    messages = [{"role": "user", "content": "How many?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    direct = build_tokenizer(DIRECT_TEMPLATE).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == direct + "<think>\n"


def test_blocks_and_strings_give_the_same_text_and_turns_are_kept(tokenizer):
    blocks = [
        {"role": "system", "content": "Think carefully."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nHow many? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
    ]
    text = tokenizer.apply_chat_template(blocks, tokenize=False)
    assert text == (
        "<|im_start|>system\nThink carefully.<|im_end|>\n"
        "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nHow many?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )


@pytest.mark.parametrize("task", ["think", "direct"])
def test_lessons_are_written_as_the_template_writes_them(tokenizer, task):
    if task == "direct":
        tokenizer = build_tokenizer(DIRECT_TEMPLATE)
    for i in range(50):
        item = scene_item("train", 9, i, num_images=0)
        messages = [{"role": "user", "content": item.problem}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert written_prompt(item.scenes, item.question.text, opens_think=task == "think") == expected


def test_a_lesson_never_shows_a_held_out_scene():
    rng = Random(0)
    prompts = {sample_lesson("direct", rng, split="train").prompt.split("</img>")[0] for _ in range(500)}
    heldout = {sample_lesson("direct", rng, split="heldout").prompt.split("</img>")[0] for _ in range(500)}
    assert not prompts & heldout
