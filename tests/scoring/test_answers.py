"""What is read as the answer, and what counts as equal to the gold."""

import json
import time
from pathlib import Path

import pytest

from r1v_rl.errors import UserError
from r1v_rl.scoring.answers import parse_gold, quick_verdict
from r1v_rl.scoring.exact import read_number, same_number
from r1v_rl.scoring.extraction import find_answer

ROWS = [json.loads(line) for line in (Path(__file__).parent / "equivalence_cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so 2+3</think> The answer is \boxed{5}.", "5"),
        (r"<think>so \boxed{5}</think> I really do not know it.", None),
        (r"<think>so \boxed{5}", None),
        (r"a</think>\boxed{4}<think>\boxed{5}", None),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}} and more \{", r"\{1,2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5", None),
        (r"\boxed{ }", None),
        ("<answer>1</answer> <answer> $42$ </answer>", "42"),
        (r"<answer>4</answer> \boxed{5}", "5"),
        (r"\boxed{6}. The final answer is $5$. I hope it is correct.", "6"),
        ("**Answer:** 5", "5"),
        ("We add.\n#### 5", "5"),
        ("Final Answer: The largest $n$ is 34. I hope it is correct.", "34"),
        (r"Thus $x=2$ and so \(y = 3\) holds.", "y = 3"),
        ("The answer is $x = 3$ or $x = -2$.", "x = 3 or x = -2"),
        ("The answer is $5$ km.", "5 km"),
        ("The answer is $5$, since $2+3=5$.", "5"),
        ("The answer is not $5$.", "not 5"),
        ("Thus $x = 3$ or $x = -2$.", "x = 3, x = -2"),
        ("Thus x = 3 or x = -2.", "Thus x = 3 or x = -2"),
        ("It is not $5$.", None),
        ("So it might be $5$.", None),
        (r"So the probability that it does not rain is $\frac{3}{10}$.", r"\frac{3}{10}"),
        ("Therefore, if $x = 2$, the value is $7$.", "7"),
        ("The distance between $A$ and $B$ is $5$.", "5"),
        ("We get $a=3$ and $b=4$, $c=5$", "c=5"),
        ("The answer is $5$, not 6.", "5"),
        ("The answer is $72$ ways, if no two sit together.", "72"),
        ("Answer: $2+3=5$, thus $5$", "5"),
        ("<answer>either $4$ or $5$</answer>", "either $4$ or $5$"),
        (r"\boxed{Not $5$}", "Not $5$"),
        (r"\boxed{Numbers $4$, $5$}", "Numbers $4$, $5$"),
        (r"\boxed{The area of $ABCD$ is $5$}", "5"),
        ("There are 7 apples and 5 pears on this table.", None),
        ("3+2", "3+2"),
        ("", None),
    ],
)
def test_the_answer_is_found_where_the_stated_order_says(completion, answer):
    assert find_answer(completion) == answer


def test_the_only_number_of_the_last_line_answers_a_number_question():
    assert find_answer("First 3 and 4.\nIn all that makes 7 of them.", "number") == "7"
    assert find_answer("That makes 7 or perhaps 8 of them.", "number") is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 15_000,
        "}" * 100_000,
        "\\" * 100_000,
        r"\boxed{1} " * 10_000,
        "answer is " * 10_000,
        "$ " * 115_000,
        "<answer>" * 15_000,
        "<think>" * 15_000 + "</think>" * 15_000,
        "9" * 100_000,
        r"\boxed{" + " " * 100_000 + "5}",
        r"\boxed{" + "1," * 115_000 + "}",
        r"\boxed{" + "A) " * 35_000 + "}",
        "so it is 5 of them, " * 5_000,
        "option " * 15_000,
        "(A) " * 25_000,
        "A. \n" * 25_000,
    ],
)
@pytest.mark.parametrize("kind", ["math", "number", "choice", "text"])
def test_a_long_text_is_read_in_one_pass(text, kind):
    started = time.process_time()
    answer = find_answer(text, kind, ["dog", "it is 5"] if kind == "choice" else None)
    if answer is not None:
        quick_verdict(answer, "5" if kind != "choice" else "A", kind)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("5", "5.0", True),
        ("-1234.5", "-1,234.50", True),
        ("1234567", r"1\,234\,567", True),
        ("0.015", "1.5e-2", True),
        (r"6.02\cdot 10^{23}", r"6.02\times10^{23}", True),
        (r"\frac{5}{2}", "2 1/2", True),
        ("1", r"2\frac{1}{2}", False),
        (r"\frac13", "0.333333", True),
        (r"\frac13", "0.333", False),
        ("0.00000025", "0.00000031", False),
        ("0", "0.0000004", False),
        ("3.14", "3.1400001", True),
        ("100000000000000000000", "100000000000000000001", False),
        ("10000", "9999.5", False),
        (r"\frac13", "333333/1000000", False),
        ("5", "1.5E9999999", False),
        ("1e9999999", "10e9999998", True),
    ],
)
def test_numbers_are_compared_exactly(gold, answer, equal):
    assert same_number(read_number(gold), read_number(answer)) is equal


@pytest.mark.parametrize("text", ["0,111", "1,5", "x", "5 cm", "1/0", "", "5²", "1.2.3", "1, 234", "--5", "1e", "."])
def test_what_is_not_one_plain_number_is_not_read_as_one(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "answer", "choices", "correct"),
    [
        ("B", "B", None, True),
        ("B", "(B)", None, True),
        ("B", "B. 12", None, True),
        ("B", r"\text{B}", None, True),
        ("B", "b", None, False),
        ("B", "A, B", None, False),
        ("B", "ABCD", None, False),
        ("B", "B) or C)", None, False),
        ("B", "B. red", ["blue", "red"], True),
        ("B", "B. blue", ["blue", "red"], False),
        ("B", "Red", ["blue", "red"], True),
        ("red", "B", ["blue", "red"], True),
        ("(D) Alina", "D", None, True),
        ("violet", "B", ["blue", "red"], None),
        ("B", r"\textbf{(B)}\ 15", ["12", "15"], True),
        ("B", r"\textbf{(B)}~15", None, True),
        ("B", r"\textbf{(B)}\ 12", ["12", "15"], False),
        ("B", r"\text{Option B}", None, True),
        ("B", "The correct option is B", None, True),
        ("B", "The answer is option B.", None, True),
        ("B", "The answer is red", ["blue", "red"], True),
        ("B", "Option B: 15", ["12", "15"], True),
        ("B", "Option B: 12", ["12", "15"], False),
        ("B", "The answer is not B", None, False),
        ("B", "The answer is B or C", None, False),
        ("B", "Option A, option B", None, False),
        ("B", "15 (B)", ["12", "15"], True),
        ("B", "12 (B)", ["12", "15"], False),
        ("B", "(A) or (B)", None, False),
        ("B", "A or (B)", None, False),
        ("B", "not (B)", None, False),
    ],
)
def test_a_choice_is_one_letter_or_its_text(gold, answer, choices, correct):
    assert quick_verdict(answer, gold, "choice", choices).correct is correct


@pytest.mark.parametrize(
    ("answer", "correct"), [("5", True), ("05", True), ("50", False), ("6", False), ("5" * 99, False)]
)
def test_whole_numbers_take_the_shortest_way(answer, correct):
    assert quick_verdict(answer, "5").correct is correct


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("(3, 5)", "(3,4)", False),
        ("(3, 4.0)", "(3,4)", True),
        ("(4,3)", "(3,4)", False),
        ("(1,2,3)", "(1,2)", False),
        ("2,1,1", "1,2", True),
        ("1,2", "1,2,3", False),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("[1/2, 3)", "[0.5,3)", True),
        ("(1,2)", "[1,2)", None),
        ("200, 100", "100, 200", True),
        ("5, 5", "(5,5)", True),
        ("(5, 4)", "5,4", True),
        ("100,200", "200, 100", None),
        ("100200", "100, 200", None),
        ("1,234, 5", "1234, 5", None),
        ("(x,2)", "(1,2)", None),
        (r"(\pi,2)", "(3,2)", None),
        ("5 cm, 3", "5,3", None),
    ],
)
def test_lists_of_plain_numbers_are_decided_by_reading(answer, gold, correct):
    """None: sympy decides."""
    found = quick_verdict(answer, gold)
    assert (found and found.correct) is correct


def test_a_bare_letter_is_the_gold_only_where_nothing_is_said_of_it():
    assert quick_verdict("Option B", "B").correct is True
    assert quick_verdict("option B fails", "B").correct is not True


def test_words_are_words_and_not_products_of_letters():
    assert quick_verdict("silent", r"\text{listen}").correct is False
    assert quick_verdict(r"\text{Listen}", r"\text{listen}").correct is True
    assert quick_verdict("Dog", "dog").correct is True
    for gold, answer in (("cat", "act"), ("IV", "VI")):
        assert quick_verdict(answer, gold).correct is False
    assert quick_verdict("ba", "ab") is None
    assert quick_verdict("two  Red balls.", "Two red balls", "text").correct is True


@pytest.mark.parametrize(
    ("gold", "read"),
    [
        (r"so \boxed{84}", "84"),
        ("$x$", "x"),
        ("$$5$$.", "5"),
        ("a\n#### 7", "7"),
        (3, "3"),
        (0.5, "0.5"),
        ("$5$,$6$", "$5$,$6$"),
        ("$3$/$4$", "$3$/$4$"),
        ("$5$ km", "$5$ km"),
        ("The answer is $3$ or $-2$.", "3 or -2"),
    ],
)
def test_a_gold_loses_its_wrapping_only(gold, read):
    assert parse_gold(gold) == read


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", None, True, ["5"], {5}])
def test_a_gold_that_is_no_answer_is_refused(gold):
    with pytest.raises(UserError, match="gold answer must"):
        parse_gold(gold)


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="answer_kind must be one of math, number, choice, text"):
        parse_gold("5", "maths")


def test_bare_golds_are_read_whole(pool):
    """math-verify, given a bare gold, takes a number out of it: 3 for each of the first two."""
    golds = [
        r"3\sqrt{2}",
        r"3+x",
        r"6.02\times10^{23}",
        "1,2,3",
        "2x+3",
        "3*x-1*y+13=0",
        "10^{-3}",
        r"1 \frac12",
        r"\sqrt2",
    ]
    numbers = ["3", "3", "10", "1.2", "2", "0", "10", r"\frac12", "2"]
    assert [v.correct for v in pool.judge_answers([rf"\boxed{{{n}}}" for n in numbers], golds)] == [False] * len(golds)
    assert all(v.correct for v in pool.judge_answers([rf"\boxed{{ {g} }}" for g in golds], golds))


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("5", "1=2=3=4=5", False),
        ("5", "6=5", False),
        ("5", "5=x", True),
        ("5", "x=2+3=5", True),
        ("5", "x=y=5", True),
        ("1.43", r"v=\frac{10}{7}=1.43", True),
        ("25", r"p=\frac14=25\%", True),
        ("30", r"\theta=\frac{\pi}{6}=30^\circ", True),
        ("11", "x=5+5+1=11", True),
        ("5", r"x=4\;x=5", False),
        ("5", r"x=4 \text{ or } x=5", False),
        ("5", "x=4 or x=5", False),
        ("5", r"x=4 \lor x=5", False),
        ("5", r"x_1=4\quad x_2=5", False),
        ("5", r"x=4\\ x=5", False),
        ("5", r"x=4 \implies y=5", False),
        ("5", r"a=4 \text{ and } b=5", False),
        ("5", r"x=4 \text{ wait } y=5", False),
        ("300 cm", "l = 3 m = 300 cm", True),
        ("20", "P = 4 s = 20", True),
        ("5", r"\text{not } x=5", False),
        ("3,-2", r"x=3 \text{ or } x=-2", True),
        ("x=3 or x=-2", r"x=-2 \lor x=3", True),
        ("5", "3+2=5", True),
        ("5", r"x\approx 5", True),
        ("3.14", r"\pi\approx 3.14", True),
        ("5", r"6\approx 5", False),
        ("12.57", r"\approx 12.57", True),
        ("12.57", r"\approx 12.57\text{ cm}", True),
        ("100, 200", "100200", False),
        ("100200", "100, 200", False),
        ("10", r"\sum_{i=1}^{4} i", True),
        ("10", r"\sum_{i=1}^{4} i = 10", True),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
        ("101_2", "101", False),
        ("(1,2)", r"\{1,2\}", False),
        (r"\langle 1,2\rangle", "(1,2)", True),
        ("x=2", "2x=4", False),
        (r"50\%", r"\sqrt{\infty}", False),
        ("50", r"\infty", False),
        (r"\infty", r"\infty+1", True),
        (r"-\infty", r"\infty", False),
        ("0", r"\infty-\infty", False),
        ("18", "€18", True),
    ],
)
def test_where_math_verify_alone_is_wrong(pool, gold, answer, equal):
    assert pool.judge_answers([rf"\boxed{{{answer}}}"], [gold])[0].correct is equal


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("x=5,y=4", "(5,4)", True),
        ("x=5,y=4", "5, 4", True),
        ("x=5,y=4", r"5 \text{ and } 4", True),
        ("x=5,y=4", r"\begin{pmatrix}5\\4\end{pmatrix}", True),
        ("x=5,y=4", "y=4,x=5", True),
        ("x=5,y=4", "(4,5)", False),
        ("x=5,y=4", "4,5", False),
        ("x=5,y=4", "(5,4]", False),
        ("x=5,y=4", r"\{4,5\}", False),
        ("x=5 and y=4", "(4,5)", False),
        ("a=1,b=2,c=3", "(3,2,1)", False),
        (r"x=\frac12, y=\sqrt2", r"(\sqrt2,0.5)", False),
        ("(5,4)", "y=4,x=5", True),
        ("(4,5)", "y=4,x=5", False),
        ("(2,-3)", "m=2,b=-3", True),
        ("4,5", "x=5,y=4", True),
        ("x=1,x=2", "2,1", True),
        ("x_1=3,x_2=-2", "-2,3", True),
    ],
)
def test_values_of_different_names_keep_their_order(pool, gold, answer, equal):
    assert pool.judge_answers([rf"\boxed{{{answer}}}"], [gold])[0].correct is equal


@pytest.mark.parametrize(
    ("gold", "completion", "equal"),
    [
        ("$5$,$6$", r"\boxed{6}", False),
        ("$5$,$6$", r"\boxed{6,5}", True),
        (r"\(5\), \(6\)", r"\boxed{6}", False),
        ("$2$:$3$", r"\boxed{2:3}", True),
        ("$3$/$4$", r"\boxed{0.75}", True),
        ("$5$ km", r"\boxed{5\text{ m}}", False),
        ("5 m", "The answer is $5$ km.", False),
        ("The answer is $3$ or $-2$.", r"\boxed{-2}", False),
        ("-2", "The answer is $x = 3$ or $x = -2$.", False),
        ("-2,3", "The answer is $x = 3$ or $x = -2$.", True),
        ("5", r"\boxed{either $4$ or $5$}", False),
        ("5", r"\boxed{Not $5$}", False),
    ],
)
def test_of_several_formulas_none_is_dropped(pool, gold, completion, equal):
    assert pool.judge_answers([completion], [gold])[0].correct is equal


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_answers_that_other_graders_were_tested_with(pool, row):
    assert bool(pool.judge_answers([row["completion"]], [row["gold"]])[0].correct) is row["equal"]
