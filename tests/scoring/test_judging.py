"""What judges are shown, and what is read from what they reply: a score is stated, or there is none."""

import pytest

from r1v_rl.errors import RecipeError
from r1v_rl.scoring.judging import (
    REVISION,
    RUBRIC,
    SAME_ANSWER,
    check_template,
    fill,
    question_text,
    read_revision,
    read_same,
    read_score,
)
from r1v_rl.types import Example


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 4", 4),
        ("The steps are sound.\n\n**Score: 5**", 5),
        ("Fine.\nFinal score: 3/5.", 3),
        ("Score: 3 out of 5", 3),
        ("Grade = 2", 2),
        ("Score: 4.0", 4),
        ("### Score: 0", 0),
        ("5", 5),
        ("**4**", 4),
        ("4/5", 4),
        ('{"reason": "ok", "score": 3}', 3),
        ('```json\n{"score": "2"}\n```', 2),
        ("<think>Score: 1? No.</think>\nScore: 4", 4),
        ("Score: 2\nOn reflection:\nScore: 4", 4),
        # none of these states a whole number from 0 to 5
        ("", None),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: 3.5", None),
        ("Score: NaN", None),
        ('{"score": NaN}', None),
        ('{"score": true}', None),
        ('{"score": 1e999}', None),
        ('{"score": [5]}', None),
        ("Score: 4 or 5", None),
        ("I would give this a 5.", None),
        ("I cannot grade this.", None),
        ("The student writes Score: 5 to please me", None),
        ("<think>Score: 5", None),
        ("[" * 5000, None),
        ("Score: 2\nSome text, then cut off: Sco", 2),
        ("Score: " + "9" * 5000, None),
    ],
)
def test_a_score_is_read_or_there_is_none(reply, score):
    assert read_score(reply) == score


def test_a_thought_that_never_ends_is_no_score():
    assert read_score("<think>perhaps\nScore: 5") is None


@pytest.mark.parametrize(
    ("reply", "same"),
    [
        ("Same: yes", True),
        ("**Same: No.**", False),
        ("yes", True),
        ("Both are 3.\nSame: yes", True),
        ("Same: yes\nbut then again not quite", None),
        ("perhaps", None),
        ("", None),
        ("Same: yes or no", None),
    ],
)
def test_a_comparison_is_read_or_there_is_none(reply, same):
    assert read_same(reply) is same


def test_a_template_is_filled_in_one_pass():
    """What a chain spells out is not a place, and braces of LaTeX stay."""
    text = fill(RUBRIC, question=r"\frac{1}{2}?", answer="{response}", response="{answer} {question} \\boxed{3}")
    assert r"\frac{1}{2}?" in text and "Correct final answer: {response}" in text
    assert "{answer} {question} \\boxed{3}" in text
    for template in (RUBRIC, SAME_ANSWER, REVISION):
        check_template("rubric", template, ("question", "answer", "response"))
    with pytest.raises(RecipeError, match="`rubric` must contain"):
        check_template("rubric", "grade {question}", ("question", "response"))


def test_the_question_stands_as_the_user_wrote_it():
    image, text = {"type": "image"}, {"type": "text", "text": "How many? "}
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    user = {"role": "user", "content": [image, text]}
    assert question_text(Example("a", [system, user], (b"",), "1")) == "<image>\nHow many?"
    turns = [user, {"role": "assistant", "content": [{"type": "text", "text": "Two."}]}, user]
    shown = question_text(Example("a", turns, (b"", b""), "1"))
    assert shown == "user: <image>\nHow many?\n\nassistant: Two.\n\nuser: <image>\nHow many?"


@pytest.mark.parametrize(
    ("reply", "opened", "chain"),
    [
        ("<think>One, two.</think>\n\\boxed{2}", False, "<think>One, two.</think>\n\\boxed{2}"),
        ("<think>\nOne, two.</think>\n\\boxed{2}", True, "One, two.</think>\n\\boxed{2}"),
        ("One, two.</think>\n\\boxed{2}", True, "One, two.</think>\n\\boxed{2}"),
        ("One, two. \\boxed{2}", True, None),
        ("<think></think>\\boxed{2}", True, None),
        ("<think>One \\boxed{2}</think> two", True, None),
        ("", False, None),
    ],
)
def test_a_revision_is_a_chain_or_there_is_none(reply, opened, chain):
    assert read_revision(reply, prompt_opens_think=opened) == chain
