"""Units, percent, intervals, vectors: the decisions of docs/rewards.md, one row each."""

import pytest

from r1v_rl.scoring.extraction import find_answer, last_boxes
from r1v_rl.scoring.units import read_quantity

CASES = [
    ("5 cm", "5 m", False),
    ("5", "5 cm", True),
    ("5 cm", "5", True),
    ("5 cm", r"50\text{ mm}", True),
    (r"5\text{ km}", "5000 m", True),
    (r"5\text{ km}", "5 m", False),
    ("5o", "5", False),
    ("5", "5o", False),
    ("5m", "5", False),
    ("5x", "5 x", True),
    ("5x", "5", False),
    ("5", "5x", False),
    ("5", r"5\%", True),
    ("5", r"500\%", False),
    (r"50\%", "0.5", True),
    (r"50\%", "50", True),
    ("0.5", r"50\%", True),
    ("0.5", r"0.5\%", False),
    (r"0.5\%", "0.005", True),
    (r"5\%", "500", False),
    (r"\frac12", r"50\%", True),
    ("18", "$18", True),
    (r"\$18", "€18", False),
    (r"\$18", "18 dollars", True),
    (r"\$0.50", "50 cents", True),
    ("90", "90°", True),
    (r"90^\circ", r"\frac{\pi}{2}", True),
    (r"\frac{\pi}{2}", r"90^\circ", True),
    (r"\frac{\pi}{2}", "90", False),
    (r"90^\circ", "1.57", False),
    ("5", "5 or 6", False),
    ("5", "5 apples", True),
    ("5", "5 or more", False),
    ("5 million", "5", False),
    ("5000000", "5 million", True),
    (r"\$5 million", "5", False),
    (r"\$5 million", "5000000", True),
    ("5", r"\$5 million", False),
    ("5 million", r"\$5 million", True),
    (r"\$5,000,000", "5 million", True),
    ("5", "5 million km", False),
    (r"5\pi\text{ million km}", r"5\pi", False),
    ("5 million", r"5\%", False),
    ("12 cm²", "12 cm^2", True),
    ("12 cm²", "12 cm", False),
    ("5", "5 m/s²", True),
    ("12", r"12\text{ cm}²", True),
    ("5", "5²", False),
    ("5", "5½", False),
    ("12", r"12\text{ sq. units}", True),
    ("12 square units", r"12\text{ units}^2", True),
    ("12 square units", "12 cubic units", False),
    ("12", "12 square", False),
    ("5 units", "5 cm", True),
    ("5", r"5\,\mathrm{cm^{2}}", True),
    ("5 m/s", r"5\,\mathrm{m\,s^{-1}}", True),
    ("5 m/s", r"5\,\mathrm{m\,s^{-2}}", False),
    ("5", "5 m g", False),
    ("18", r"\$18 \text{ per day}", True),
    (r"\$18", r"\$18 \text{ per day}", False),
    ("60", "60 words per minute", True),
    ("60 words per minute", "1 word per second", True),
    ("60 minutes", "60 words per minute", False),
    ("60", "60 students per class", False),
    ("5 deaths per thousand people", "5 deaths per million people", False),
    ("5 apples per box", "5 boxes per apple", False),
    ("5", "5 people per thousand", False),
    ("5", "5 or more per day", False),
    ("3", "3 at least", False),
    ("5 hours", "300 minutes", True),
    ("60 mph", "60 km/h", False),
    ("9.8", r"9.8\,\mathrm{m/s^2}", True),
    ("9.8 m/s^2", "9.8 m/s", False),
    ("(1,2)", "]1,2[", True),
    ("[1,2)", "[1,2[", True),
    ("(1,2)", "[1,2]", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False),
    ("[-2,7]", r"-2\le x\le 7", True),
    (r"x\in[-2,7]", r"-2\le x\le 7", True),
    (r"(3,\infty)", "x>3", True),
    (r"(3,\infty)", "2x+1>7", False),
    (r"(3,\infty)", r"x\ge 3", False),
    ("A", "a", False),
    ("E", "e", False),
    ("2I", "2i", False),
    ("101_2", "101_3", False),
    ("101_2", "101_{2}", True),
    ("1", "1=2=1", False),
    ("5", "x=5 cm", True),
    ("5 m", "5 s", False),
    (r"12\pi", r"12\pi\text{ cm}^2", True),
    (r"12\pi\text{ cm}", r"12\pi\text{ cm}^2", False),
    (r"\frac{1}{2}\text{ m}", "50 cm", True),
    (r"\sqrt{2}\text{ m}", r"100\sqrt2\text{ cm}", True),
    ("2 min", "2", True),
    ("3,4", "4,3", True),
    ("(3,4)", "(4,3)", False),
    ("1e400", "1e401", False),
    ("x^2", "x^2 m", False),
    ("3 miles", "3 meters", False),
    ("1234567", "1,234,567", True),
    ("1.5", "1,5", False),
    ("5", "5!", False),
    ("120", "5!", True),
    ("10 cm^2", "10 cm", False),
    ("10 square inches", "10 in^2", True),
    ("2x", "2 x", True),
    ("x=2", "2", True),
    ("2", "x=2", True),
    ("x=5", "y=5", False),
    ("x+2", "2+x", True),
    ("5", "-5", False),
    (r"\pm3", "3", False),
    ("even", "odd", False),
    ("7:30", "7:30", True),
    ("7:30", "7.5", False),
    (r"25^\circ C", "25", True),
    (r"25^\circ C", r"25^\circ F", False),
    ("3 pm", "3", False),
    ("5 g", "5", True),
    ("5g", "5", False),
    ("9", "3^2", True),
    ("4 N", "4 kg", False),
    ("0.333333", r"\frac13", True),
    ("2.5 kg", "2500 g", True),
    ("1/3 hour", "20 minutes", True),
    ("10%", "0.1", True),
    ("10", "0.1", False),
    ("1", r"100\%", True),
    ("1", r"1\%", False),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), CASES)
def test_each_decision_holds(pool, gold, answer, equal):
    assert (pool.judge_answers([rf"\boxed{{{answer}}}"], [gold])[0].correct is True) is equal


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [
        ("5 cm", "5", (("m", 1),)),
        (r"5\text{ m/s}^2", "5", (("m", 1), ("s", -2))),
        (r"9.8\,\mathrm{m/s^2}", "9.8", (("m", 1), ("s", -2))),
        ("3 square inches", "3", (("m", 2),)),
        ("60 miles per hour", "60", (("m", 1), ("s", -1))),
        (r"\$1,200", "1,200", (("dollar", 1),)),
        (r"90^{\circ}", "90", (("degree", 1),)),
        ("7 small apples", "7", None),
        ("192公斤", "192", (("g", 1),)),
    ],
)
def test_a_unit_is_taken_off_its_value(text, value, dimension):
    quantity = read_quantity(text)
    assert (quantity.value, quantity.dimension, quantity.has_unit) == (value, dimension, True)


@pytest.mark.parametrize(
    "text", ["5m", "5x", "5o", "x m", "5 or 6", "5 or more", "3 at least", r"\sin x", "cm", "", "5", "4 m n"]
)
def test_what_is_no_unit_stays(text):
    assert not read_quantity(text).has_unit


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3"),
        (r"\boxed{1} \text{ for (a) and } \boxed{2}", "1, 2"),
        (r"\boxed{5} and \boxed{5}", "5"),
        (r"\boxed{4} no wait, \boxed{5}", "5"),
        ("\\boxed{4}\nand\n\\boxed{5}", "4, 5"),
        (r"\boxed{4}. Now let us think about all of it once more, from the start, and \boxed{5}", "5"),
        (r"\boxed{\boxed{7}}", "7"),
    ],
)
def test_boxes_that_are_joined_are_one_answer(text, boxes):
    assert last_boxes(text) == boxes


@pytest.mark.parametrize(
    ("completion", "kind", "answer"),
    [
        (r"\boxed{\text{The answer is }5}", "math", "5"),
        (r"\boxed{Answer $9$}", "math", "9"),
        (r"\boxed{$3$ cm}", "math", "$3$ cm"),
        ("So the probability that she wins is 2/3.", "math", "2/3"),
        ("Donc le total est de 100 - 30 = 70", "math", "70"),
        ("因此，体重是192公斤。", "math", "192公斤"),
        ("In all that makes **92**.", "math", "92"),
        ("I wonder whether it is 5.", "math", None),
        ("Thus y = 5", "math", "y=5"),
        ("It is 7.<|im_end|>\nuser: no, 8", "math", "7"),
        ("The correct option is (C) 32.", "choice", "C"),
        ("It stands in the (B) lower half of the mould.", "choice", "B"),
        ("It is (A) or (B).", "choice", "It is (A) or (B)"),
        ("所以答案是（D）40m。", "choice", "D"),
    ],
)
def test_a_sentence_states_its_value(completion, kind, answer):
    assert find_answer(completion, kind) == answer
