"""The format reward: what earns it, what must not, and how long a look takes."""

import time

import pytest

from r1v_rl.scoring.format import has_format, prompt_opens_think, with_prompt_think

GOOD = "<think>2 and 3 make 5</think>\nThe answer is \\boxed{5}."


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        GOOD.removeprefix("<think>"),
        "\n<think>\nIt is <b>five</b>, since 2 < 3\n</think>\n\n\\boxed{\\frac{10}{2}}",
        "<think>ab</think>\\boxed{}\\boxed{5}",
    ],
)
def test_one_thought_then_a_box_earns_it(completion):
    assert has_format(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "<think></think>\\boxed{5}",
        "<think> \n</think>\\boxed{5}",
        "<think>.</think>\\boxed{5}",
        "<think>so \\boxed{5}</think> done",
        "<think>2 and 3</think> The answer is 5",
        "<think>2 and 3</think>\\boxed{}",
        "<think>2 and 3</think>\\boxed{5",
        "<think>2 and 3 \\boxed{5}",
        "\\boxed{5}",
        "<think>aa</think><think>bb</think>\\boxed{5}",
        "<think>aa<think>bb</think></think>\\boxed{5}",
        "<think>aa</think></think>\\boxed{5}",
        "<think>aa</think>\\boxed{5}</think>",
        "<think>aa</think>\\boxed{5<think>}",
        "<THINK>2 and 3</THINK>\\boxed{5}",
        "<think>aa</think>< / Think >\\boxed{5}",
        "Well. <think>2 and 3</think>\\boxed{5}",
        "",
    ],
)
def test_nothing_else_earns_it(completion):
    assert not has_format(completion)


def test_a_thought_that_the_prompt_opened_must_be_closed_once_and_not_opened_again():
    assert prompt_opens_think("<|Assistant|><think>\n") and not prompt_opens_think("<think>a</think>")
    assert has_format("2 and 3</think>\\boxed{5}", opened=True)
    assert not has_format(GOOD, opened=True)
    assert not has_format("2 and 3</think>\\boxed{5}", opened=False)
    assert with_prompt_think("never closed", True) == "<think>never closed"


@pytest.mark.parametrize(
    "text",
    ["</think>" * 10_000, "<think>" * 10_000, "<" + " " * 50_000, "< " * 40_000, "\\boxed {" * 10_000, "{" * 50_000],
)
@pytest.mark.parametrize("head", ["", "<think>ab</think>", "<think>ab", "<think>ab</think>\\boxed{5"])
def test_a_long_text_is_looked_at_once(head, text):
    started = time.perf_counter()
    assert not has_format(head + text + "x")
    assert time.perf_counter() - started < 0.3
