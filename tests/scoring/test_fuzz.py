"""Answers from a grammar of mathematics and garbage: no hang, no crash, the same verdicts again."""

import os
import random
import time

from r1v_rl.scoring import GraderPool

ATOMS = [
    "5", "-3", "0.25", "1,234", "x", "y", r"\pi", "e", "i", r"\infty", r"\frac{1}{2}", "2^{10}", r"\sqrt{2}", "10!",
    r"\text{cm}", r"\%", "°", "½", "５", "−", "\u200b", "٣", "A", "(B)", r"\circ", "1e5", "1.5E-3", "999999999999",
]  # fmt: skip
PAIRS = ["+", "-", r"\cdot ", "/", "^", "_", "=", "<", r"\le ", ",", ";", ":", " ", r"\cup ", r"\in ", "&", r"\\", "!"]
WRAPS = [
    ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("]", "["), (r"\{", r"\}"), (r"\frac{", "}{3}"), (r"\sqrt{", "}"),
    (r"\log_{2}{", "}"), (r"\sin ", ""), (r"\left(", r"\right)"), (r"\begin{pmatrix}", r"\end{pmatrix}"),
    (r"\text{", "}"), (r"\sum_{k=1}^{9}", ""), (r"\lim_{x\to 0}", ""), (r"\int_0^1 ", "dx"), ("|", "|"), ("$", "$"),
    (r"\boxed{", "}"), (r"\binom{", "}{2}"), ("x^{", "}"), ("", r"\pmod{7}"), ("{", ""), ("", "}"), (r"\frac{", ""),
]  # fmt: skip
FRAMES = [
    r"<think>a</think>\boxed{%s}", r"\boxed{%s}", "The answer is %s.", "<answer>%s</answer>", "#### %s", "%s",
    r"<think>\boxed{%s}", "$%s$", r"\boxed{1} and \boxed{%s}",
]  # fmt: skip
GOLDS = ["5", r"\frac{1}{2}", "x+1", "(1,2)", r"\{1,2\}", "[1,3)", r"50\%", "5 cm", "B", "x=2", r"\sqrt{2}", "blue"]


def answer_of(random_: random.Random, depth: int) -> str:
    if depth == 0 or random_.random() < 0.25:
        return random_.choice(ATOMS)
    if random_.random() < 0.5:
        return answer_of(random_, depth - 1) + random_.choice(PAIRS) + answer_of(random_, depth - 1)
    before, after = random_.choice(WRAPS)
    return before + answer_of(random_, depth - 1) + after


def test_fuzzed_answers_never_hang_crash_or_change_their_verdict():
    """300 answers; `R1V_FUZZ=20000` takes more, `R1V_SEED` the same ones again. The second pass has another order and
    fresh workers, so that a verdict that depends on what a worker saw before it shows."""
    number, seed = int(os.environ.get("R1V_FUZZ", 300)), int(os.environ.get("R1V_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    random_ = random.Random(seed)
    completions = [random_.choice(FRAMES).replace("%s", answer_of(random_, 4)) for _ in range(number)]
    golds = [random_.choice(GOLDS) for _ in range(number)]
    with GraderPool(2) as pool:
        first = pool.judge_answers(completions, golds, timeout_s=2.0)
    order = random_.sample(range(number), number)
    with GraderPool(2) as pool:
        shuffled = pool.judge_answers([completions[i] for i in order], [golds[i] for i in order], timeout_s=2.0)
    again = [verdict for _, verdict in sorted(zip(order, shuffled, strict=True), key=lambda pair: pair[0])]
    shown = [row for row in zip(completions, golds, first, strict=True) if row[2].reason == "crashed"]
    assert not shown, (seed, shown[:3])
    cut = [row[:2] for row in zip(completions, golds, first, strict=True) if row[2].reason == "timeout"]
    assert len(cut) <= 0.02 * number, (seed, cut[:3])  # cut off at the deadline, which is no hang
    changed = [
        row
        for row in zip(completions, golds, first, again, strict=True)
        if row[2] != row[3] and "timeout" not in (row[2].reason, row[3].reason)
    ]
    assert not changed, (seed, changed[:3])
