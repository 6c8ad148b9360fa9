"""Rewards by name, path and function: how they are found, called and checked."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1v_rl.errors import RewardError
from r1v_rl.scoring import load_rewards

REWARDS = Path(__file__).parents[2] / "rewards"
GOOD = "2 and 3 make 5</think> \\boxed{5}"


def batch(*texts, **columns):
    return {
        "prompts": [[{"role": "user", "content": "2+3?"}] for _ in texts],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(range(len(text))) for text in texts],
        "id": [f"row-{index}" for index in range(len(texts))],
        **columns,
    }


def load(function, name="reward"):
    function.__name__ = name
    return load_rewards([function])[0]


def test_accuracy_and_format_by_name():
    accuracy, well_formed = load_rewards(["accuracy", "format"])
    rows = batch(GOOD, "<think>\\boxed{5}</think> done", "never closed <think> \\boxed{5}", "x</think>\\boxed{6}")
    extras, metrics = {}, {}
    rewards = accuracy(**rows, solution=["5"] * 4, log_extra=extras.__setitem__, log_metric=metrics.__setitem__)
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert extras["parsed_answer"] == ["5", None if extras["parsed_answer"][1] is None else "done", None, "6"]
    assert metrics["reward_workers/right"] == 0.25
    assert well_formed(**rows) == [1.0, 0.0, 0.0, 0.0]
    assert [accuracy.name, well_formed.name] == ["accuracy", "format"]


def test_recipe_keys_reach_the_built_in_rewards():
    config = SimpleNamespace(
        answer_kind="choice", format_pattern=r"^<a>.*</a>$", reward_timeout_s=1.0, reward_workers=1
    )
    accuracy, well_formed = load_rewards(["accuracy", "format"], config)
    assert accuracy(**batch("\\boxed{B}", "\\boxed{b}"), answer=["B", "B"]) == [1.0, 0.0]
    assert well_formed(**batch("<a>1</a>", GOOD)) == [1.0, 0.0]
    assert load_rewards(["accuracy"], prompt_opens_think=True)[0](**batch("so \\boxed{5}"), answer=["5"]) == [0.0]


def test_a_pattern_that_explodes_cannot_judge_and_does_not_hang():
    config = SimpleNamespace(format_pattern=r"^(a+)+$", reward_timeout_s=0.3)
    assert load_rewards(["format"], config)[0](**batch("a" * 60 + "b", "aaa")) == [None, 1.0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_pattern", "(", "format_pattern must be a regular expression; received '\\('"),
        ("answer_kind", "maths", "answer_kind must be one of"),
        ("reward_timeout_s", 0, "reward_timeout_s must be a positive number"),
        ("reward_workers", 0, "reward_workers must be a whole number"),
    ],
)
def test_a_bad_recipe_value_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(["format"], SimpleNamespace(**{key: value}))


def test_accuracy_without_a_gold_column_says_which_it_looks_for():
    with pytest.raises(RewardError, match=r"'accuracy'.*needs a dataset column named answer, solution"):
        load_rewards(["accuracy"])[0](**batch(GOOD), anser=["5"])


def test_the_files_to_copy_load_by_path_and_judge():
    path_before = list(sys.path)
    ours, theirs = load_rewards(
        [f"{REWARDS}/accuracy_and_length.py:accuracy_and_length", f"{REWARDS}/easyr1_style.py:compute_score"]
    )
    rows = batch(GOOD, "x</think>\\boxed{6}", GOOD, answer=["5", "5", None])
    extras, metrics = {}, {}
    first, second, third = ours(**rows)
    assert first == pytest.approx(1 - 0.5 * len(GOOD) / 512) and (second, third) == (0.0, None)
    assert theirs(**rows, log_extra=extras.__setitem__, log_metric=metrics.__setitem__) == pytest.approx(
        [1.0, 0.0, None]
    )
    assert extras["accuracy"] == [1.0, 0.0, 0.0] and metrics["reward_parts/format"] == pytest.approx(2 / 3)
    assert (ours.name, theirs.name) == ("accuracy_and_length", "compute_score")
    assert len(ours.source.sha256) == 64 and ours.source.path.endswith("accuracy_and_length.py")
    assert sys.path == path_before


def test_a_dotted_path_names_a_function_of_an_installed_module():
    (reward,) = load_rewards(["trl.rewards.think_format_reward"])
    assert reward(**batch("<think>a</think>b", "b")) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "did you mean 'accuracy'"),
        ("org/model", "a reward model is the name reward_model"),
        ("no_such_module.reward", "must be one of accuracy, cosine, format, judge, length"),
        ("math.no_such", "has no function 'no_such'"),
        ("nowhere.py:reward", r"nowhere\.py must be a file; it is not there"),
        (f"{REWARDS}/easyr1_style.py", "needs the name of a function"),
        (f"{REWARDS}/easyr1_style.py:compute_scores", "did you mean compute_score"),
        (3, "names and functions; received int"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name, message):
    with pytest.raises(RewardError, match=message):
        load_rewards([name])


def test_a_model_two_equal_names_and_a_bare_string_are_refused():
    with pytest.raises(RewardError, match="a model itself cannot be handed over"):
        load_rewards([SimpleNamespace(forward=None)])
    with pytest.raises(RewardError, match="'format' twice"):
        load_rewards(["format", "format"])
    with pytest.raises(RewardError, match="must be a list"):
        load_rewards("accuracy")


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("x = 1\nimport no_such_module_at_all\n", 2, "ModuleNotFoundError"),
        ("x = 1\ny = (\n", 2, "SyntaxError"),
        ("\n\nraise SystemExit(3)\n", 3, "SystemExit"),
    ],
)
def test_a_file_that_does_not_import_is_named_with_its_line(tmp_path, code, line, message):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(RewardError, match=rf"{path} does not import: {path}:{line}: {message}"):
        load_rewards([f"{path}:reward"])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "one reward per completion, 2; received 1; the first row without one is row 'row-1'"),
        ([1.0] * 3, "one reward per completion, 2; received 3"),
        ([1.0, math.inf], "finite rewards; received inf for row 'row-1'"),
        ([math.nan, 1.0], "finite rewards; received nan for row 'row-0'"),
        ([1.0, "1"], "received str '1' for row 'row-1'"),
        ("12", "a list of 2 floats or None; received str"),
        ({0: 1.0, 1: 1.0}, "received dict"),
        (None, "received NoneType"),
        ((x for x in [1.0, 1.0]), "received generator"),
    ],
)
def test_a_result_that_is_no_list_of_rewards_names_function_and_row(result, message):
    with pytest.raises(RewardError, match=f"'mine'.*{message}"):
        load(lambda **_: result, "mine")(**batch("a", "b"))


def test_rewards_may_be_none_whole_numbers_booleans_and_arrays():
    import numpy as np

    assert load(lambda **_: [None, 1, True])(**batch("a", "b", "c")) == [None, 1.0, 1.0]
    assert load(lambda **_: np.array([0.5, 1.5], dtype=np.float32))(**batch("a", "b")) == [0.5, 1.5]


def raising(**_):
    raise KeyError("colour")


def leaving(**_):
    sys.exit(7)


@pytest.mark.parametrize(("function", "cause"), [(raising, r"KeyError: 'colour'"), (leaving, "SystemExit: 7")])
def test_an_exception_names_function_file_and_line(function, cause):
    with pytest.raises(RewardError, match=rf"{function.__name__}.*test_loader\.py:\d+: {cause}") as caught:
        load_rewards([function])[0](**batch("a"))
    assert caught.value.__cause__ is not None


def test_a_position_stands_in_for_a_missing_id():
    rows = batch("a")
    del rows["id"]
    with pytest.raises(RewardError, match="position 0"):
        load(lambda **_: [math.nan])(**rows)


def test_a_function_cannot_change_what_it_is_given():
    shared = {"colours": ["red"]}
    rows = batch("a", "b", scene=[shared, shared], size=[[1, 2], [3]])

    def vandal(completions, scene, size, completion_ids, **_):
        assert scene[0] is scene[1]
        scene[0]["colours"].append("blue")
        completions[0][0]["content"] = "\\boxed{5}"
        completion_ids[0].append(7)
        size.clear()
        return [0.0, 0.0]

    load_rewards([vandal])[0](**rows)
    assert shared == {"colours": ["red"]} and rows["completions"][0][0]["content"] == "a"
    assert rows["completion_ids"] == [[0], [0]] and rows["size"] == [[1, 2], [3]]


def test_an_async_function_works_with_and_without_a_running_loop():
    import asyncio

    async def mine(completions, **_):
        await asyncio.sleep(0)
        return [0.25] * len(completions)

    (reward,) = load_rewards([mine])
    assert reward(**batch("a")) == [0.25]

    async def main():
        return reward(**batch("a"))

    assert asyncio.run(main()) == [0.25]


def test_a_sequential_compute_score_gets_one_row_at_a_time(tmp_path):
    path = tmp_path / "one_by_one.py"
    path.write_text(
        "REWARD_TYPE = 'sequential'\n"
        "def compute_score(reward_input, **_):\n"
        "    return {'overall': reward_input['response_length'] / 2, 'gold': reward_input['ground_truth']}\n"
    )
    (reward,) = load_rewards([f"{path}:compute_score"])
    assert reward(**batch("a", "abc", ground_truth=["x", "y"])) == [0.5, 1.5]


def test_a_compute_score_without_overall_is_refused(tmp_path):
    path = tmp_path / "no_overall.py"
    path.write_text("def compute_score(reward_inputs):\n    return [{'accuracy': 1.0}]\n")
    with pytest.raises(RewardError, match="dicts with the key 'overall'; row 0"):
        load_rewards([f"{path}:compute_score"])[0](**batch("a", answer=["1"]))


def test_a_run_stops_when_judging_fails_too_often():
    reward = load_rewards(["accuracy"], SimpleNamespace(reward_failure_limit=0.05))[0]
    for _ in range(49):
        assert reward(**batch(GOOD, "\\boxed{6}"), answer=["5", "\\frac{"])[1] is None
    with pytest.raises(RewardError, match=r"50 of the last 100 answers could not be judged \(50.0%; .*unparsable 1"):
        reward(**batch(GOOD, "\\boxed{6}"), answer=["5", "\\frac{"])
    reward_all = load_rewards(["accuracy"], SimpleNamespace(reward_failure_limit=1.0))[0]
    for _ in range(60):
        reward_all(**batch("\\boxed{6}"), answer=["\\frac{"])
    with pytest.raises(ValueError, match="reward_failure_limit must lie between 0 and 1"):
        load_rewards(["accuracy"], SimpleNamespace(reward_failure_limit=2.0))
