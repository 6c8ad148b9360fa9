"""No wrong answer earns more than a right one: the rewards of every shipped recipe, and the known ways to game."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from r1v_rl.scoring import judge_answers, load_rewards
from r1v_rl.scoring.format import has_format
from r1v_rl.scoring.reward_check import cases_of

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if "reward_funcs" in path.read_text()
)
GOLDS = {"math": "5", "number": "5", "choice": "B", "text": "blue"}
LONG = " ".join(f"word{i}" for i in range(60))
KNOWN = [
    ("<think></think>\\boxed{5}", 0, True),
    ("<think>.</think>\\boxed{5}", 0, True),
    ("<think>x y</think></think></think>\\boxed{5}", 0, True),
    ("<think>x y" + "</think>" * 10_000 + "\\boxed{5}", 0, True),
    ("<think>so \\boxed{5}</think> done", 0, False),
    ("<think>x y</think>", 0, False),
    ("<answer>5</answer>" * 10, 0, True),
    ("<think>a b</think><think>c d</think>\\boxed{5}", 0, True),
    ("<think>a <think>b</think> c</think>\\boxed{5}", 0, True),
    ("<think>never closed \\boxed{5}", 0, False),
    ("<think>a b</think>\\boxed{1,2,3,4,5}", 1, False),
    (f"<think>a b</think>\\boxed{{4}} {LONG} \\boxed{{5}}", 1, True),
    ("<think>a b</think>\\boxed{6}. The final answer is $5$. I hope it is correct.", 1, False),
    ("<think>a b</think>\\boxed{1=2=3=4=5}", 1, False),
    ("<think>a b</think>\\boxed{6=5}", 1, False),
    ("<think>a b</think>\\boxed{x\\approx 5}", 1, True),
    ("There are 7 apples and 5 pears", 0, False),
    ("<think>a b</think>\\boxed{4}, \\boxed{5}", 1, False),
    ("<THINK>a b</THINK>\\boxed{5}", 0, True),
]
"""Completion, format reward, whether it is right for gold 5 (reliability: empty reasoning costs the format alone)."""


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(path.relative_to(path.parents[1])) for path in RECIPES])
def test_no_wrong_answer_earns_more_than_a_right_one(recipe):
    keys = yaml.safe_load(recipe.read_text())
    functions = load_rewards(keys["reward_funcs"], SimpleNamespace(**keys | {"prompt_opens_think": None}))
    weights = keys.get("reward_weights") or [1.0] * len(functions)
    kind = keys.get("answer_kind", "math")
    gold, choices = GOLDS[kind], ["red", "blue", "green"] if kind == "choice" else None
    cases = cases_of("What is it?", gold, choices)
    texts = [case.completion for case in cases] + [rf"\boxed{{{gold}}}", rf"so</think>\boxed{{{gold}}}"]
    is_right = [case.is_right for case in cases] + [True, True]
    rows = {
        "prompts": ["What is it?"] * len(texts),
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(text.encode()) for text in texts],
        "answer": [gold] * len(texts),
        "choices": [choices] * len(texts),
    }
    parts = [function(**rows) for function in functions]
    sums = [sum(w * (part[i] or 0) for w, part in zip(weights, parts, strict=True)) for i in range(len(texts))]
    worst_right = min(total for total, right in zip(sums, is_right, strict=True) if right)
    best_wrong = max(total for total, right in zip(sums, is_right, strict=True) if not right)
    assert best_wrong <= worst_right
    assert best_wrong < sums[0] == max(sums)


@pytest.mark.parametrize(("completion", "well_formed", "right"), KNOWN)
def test_known_ways_to_game_score_as_they_should(completion, well_formed, right):
    assert has_format(completion) is bool(well_formed)
    assert judge_answers([completion], ["5"])[0].correct is right


def test_there_are_recipes_to_test():
    assert len(RECIPES) >= 5
