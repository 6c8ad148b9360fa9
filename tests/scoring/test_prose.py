"""Answers in plain sentences: what they state is read, what they only mention is not."""

import pytest

from r1v_rl.scoring import judge_answers
from r1v_rl.scoring.extraction import find_answer

PETS = ["cat", "dog", "guinea pig", "pig"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Therefore, there are 4 queries with a value lower than 0.50.", "4"),
        ("So there are 12 of them. I hope this helps!", "12"),
        ("The highest score is **1578**. It was reached in **2009**, after **1563** and more.", "1578"),
        ("The age gap between the two people is 13 years, with him being 13 years old.", "13"),
        ("The missing number is 4.\n\n1, 2, 3, __, 5", "4"),
        ("Counted again: the answer is **3 cm**.", "3 cm"),
        ("The price is $1,200.50 in all of them.\nDo you have other questions?", "$1,200.50"),
        ("There are 7 apples and 5 pears on it.", None),
        ("There are 3 birds here. There are 4 in it today.", None),
        ("The model has ___ dots divided into 2 equal groups.", None),
        ("It is 3 times larger than all the other ones there.\nIt is large.", None),
        ("The ratio is 3:4, as anybody sees.", None),
        ("If it is 5, then all is well with it.", None),
        ("Is it 5?", None),
        ("It could be 5 of them, or so.", None),
    ],
)
def test_a_number_is_read_where_a_sentence_states_it(completion, answer):
    assert find_answer(completion, "number") == answer


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The correct answer is (B).\n\nA dog is larger than a cat.", "B"),
        ("So the answer to your question is (A), the cat.", "A"),
        ("Based on the image, the answer is **(B) dog**. Cats are smaller.", "B"),
        ("The choice that matches this is B.", "B"),
        ("The correct option letter is B (dog).", "B"),
        ("I choose option B: the dog", "B"),
        ("The answer is B because it is red", "B"),
        ("所以答案是（B）dog。", "B"),
        ("故选：B。", "B"),
        ("Option A is wrong. Answer: C", "C"),
        ("(B) dog, as it barks at cats.", "B"),
        ("The answer is (B), not (A).", "B"),
        ("The answer is A, B, C, D", None),
        ("The answer is A or B", None),
        ("The answer is A/B", None),
        ("Answer: (B) cat", None),
        ("Answer: E", None),
        ("A) cat\nB) dog\nC) guinea pig", None),
        ("(A) cat (B) dog (C) guinea pig (D) pig", None),
        ("The answer is a secret.", None),
        ("It is either (A) or (B).", None),
    ],
)
def test_a_letter_is_chosen_or_only_mentioned(completion, letter):
    named = {option for option in "ABCD" if _is_right(completion, option)}
    assert named == ({letter} if letter else set())


@pytest.mark.parametrize(
    ("completion", "choices", "letter"),
    [
        ("The animal in the picture is a dog.", PETS, "B"),
        ("A cat is small. Dogs bark. It barks, so it is the dog.", PETS, "B"),
        ("It is a guinea pig.", PETS, "C"),
        ("It is a cat or a dog.", PETS, None),
        ("It is not a dog.", PETS, None),
        ("It might be a dog.", PETS, None),
        ("It is a doghouse.", PETS, None),
        ("Yes, it does.", ["No", "Yes"], "B"),
        ("There is no cat on it.\nYes.", ["No", "Yes"], "B"),
        ("Yes. No.", ["No", "Yes"], None),
        ("There is no way to know.", ["No", "Yes"], None),
        ("The angle is 50°.", ["40°", "50°", "60°"], "B"),
        ("Hence it is 3.0.", ["2", "3", "4"], "B"),
        (
            r"$x = \frac{5}{3} \pi$, so \boxed{\frac{5}{3}\pi}",
            [r"\frac { 3 } { 5 } \pi", r"\frac { 5 } { 3 } \pi"],
            "B",
        ),
        (r"\boxed{0.2727272727}", ["3/10", "3/11", "3/12"], "B"),
        (r"\boxed{50}", ["50 m", "50 km"], None),
        (r"\boxed{B (dog)}", PETS, "B"),
        (r"\boxed{B (cat)}", PETS, None),
    ],
)
def test_the_text_of_one_option_names_it(completion, choices, letter):
    named = {option for option in "ABCD"[: len(choices)] if _is_right(completion, option, choices)}
    assert named == ({letter} if letter else set())


def _is_right(completion, gold, choices=PETS):
    return judge_answers([completion], [gold], "choice", [choices])[0].correct is True
