"""What disqualifies a chain, and what looks like it and does not."""

import pytest

from r1v_rl.distill.degenerate import degenerate, mixed_scripts, repeated_frac

STEPS = " ".join(f"Cell {i} holds {i * 7 % 11} objects of colour number {i * 3 % 5}." for i in range(30))
GOOD = f"<think>{STEPS}</think>\n\\boxed{{3}}"


def problem(chain, **keys):
    return degenerate(chain, **({"opens_think": False, "question": "How many?", "max_repeated": 0.5} | keys))


def test_a_sound_chain_is_sound():
    assert problem(GOOD) == ""
    assert problem(GOOD.removeprefix("<think>"), opens_think=True) == ""


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("\\boxed{3}", "its form"),
        (f"<think>{STEPS} \\boxed{{3}}", "its form"),
        (f"<think>{'Wait, let me look at this picture once more. ' * 20}</think>\\boxed{{3}}", "repeats itself"),
        (f"<think>I cannot see the image, so I guess. {STEPS}</think>\\boxed{{3}}", "sees no picture"),
        (f"<think>As an AI language model I reason. {STEPS}</think>\\boxed{{3}}", "sees no picture"),
        (f"<think>No picture was provided. {STEPS}</think>\\boxed{{3}}", "sees no picture"),
        ("<think>First count 所有的红色圆圈都在左边所以我们数一数 then add.</think>\\boxed{3}", "mixes languages"),
        ("<think>Сначала считаем красные фигуры, and after that the blue ones.</think>\\boxed{3}", "mixes languages"),
    ],
)  # fmt: skip
def test_what_is_unfit(chain, expected):
    assert expected in problem(chain)


@pytest.mark.parametrize(
    "text",
    [
        "设 $AB = x$，则三角形 ABC 的面积为 \\frac{1}{2} \\times 6，所以答案是三",
        "The angle α equals β, since ∠ABC and ∠BCA agree",
        "In the picture I can see the image of a cat; the picture is given above",
        "π r² with r = 3 cm",
    ],
)
def test_formulas_and_pictures_are_no_fault(text):
    assert problem(f"<think>{text}</think>\\boxed{{3}}") == ""


def test_a_script_of_the_question_may_be_used():
    text = "The sign says 停止前进 which means stop and do not go on here"
    assert mixed_scripts(text) and not mixed_scripts(text, "What does the sign 停止前进 mean in English words?")


def test_only_a_revision_may_not_speak_of_the_answer():
    chain = f"<think>The correct answer is given as 3. {STEPS}</think>\\boxed{{3}}"
    assert "answer that it was given" in problem(chain, is_revision=True)
    assert problem(chain) == ""


def test_repeated_frac_by_hand():
    """40 words, the same 8 five times: 33 runs, 8 of them distinct."""
    assert repeated_frac("a b c d e f g h " * 5) == pytest.approx(1 - 8 / 33)
    assert repeated_frac("a b " * 15) == 0.0, "a short text says nothing"
