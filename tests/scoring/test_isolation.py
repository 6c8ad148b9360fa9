"""Rewards of the user's in a process of their own: whatever one does, the run goes on or stops as configured."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image

from r1v_rl.errors import RewardError
from r1v_rl.scoring import load_rewards
from r1v_rl.scoring.handover import from_json, to_json

CODE = """
import os, subprocess, sys, time

def good(completions, **_):
    return [float(len(text[0]["content"])) for text in completions]

def raises(completions, **_):
    raise KeyError("colour")

def hangs(completions, **_):
    time.sleep(3600)

def hangs_in_c(completions, **_):
    return [9 ** 9 ** 9]

async def hangs_async(completions, **_):
    import asyncio
    await asyncio.sleep(3600)

def exits(completions, **_):
    sys.exit(7)

def exits_at_once(completions, **_):
    os._exit(7)

def forks(completions, pid_file, **_):
    pid = os.fork()
    if pid == 0 and "stay" in completions[0][0]["content"]:
        time.sleep(3600)
    if pid:
        open(pid_file[0], "w").write(str(pid))
    return [1.0 if pid else 0.0] * len(completions)

def prints(completions, **_):
    print("x" * 1_000_000)
    print("y" * 1_000_000, file=sys.stderr)
    return [1.0] * len(completions)

def none(completions, **_):
    return None

def nan(completions, **_):
    return [1.0, float("nan"), 1.0]

def inf(completions, **_):
    return [1.0, 1.0, float("inf")]

def text(completions, **_):
    return ["1.0", 1.0, 1.0]

def short(completions, **_):
    return [1.0]

def changes(completions, scene, **_):
    scene[0]["colours"].append("blue")
    completions.clear()
    return [0.5, 0.5, 0.5]

def logs(completions, trainer_state, log_extra, log_metric, **_):
    log_extra("length", [len(text) for text in completions])
    log_metric("step", trainer_state.global_step)
    return [0.0] * len(completions)

def needs(completions, **_):
    return [float(os.environ["MY_API_KEY"])] * len(completions)

calls = 0

def counts(completions, **_):
    global calls
    calls += 1
    return [float(calls)] * len(completions)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def rows(*texts, **columns):
    return {
        "prompts": [[{"role": "user", "content": "2+3?"}] for _ in texts],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [[1, 2] for _ in texts],
        "id": [f"row-{index}" for index in range(len(texts))],
        **columns,
    }


def load(file, name, failure="abort", timeout_s=0.3):
    config = SimpleNamespace(reward_failure=failure, reward_timeout_s=timeout_s)
    return load_rewards([f"{file}:{name}"], config)[0]


def test_secrets_are_withheld_but_for_those_that_the_recipe_names(file, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "12345678")
    with pytest.raises(RewardError, match=r"KeyError: 'MY_API_KEY'.*name MY_API_KEY in `reward_env`"):
        load(file, "needs")(**rows("a"))
    (reward,) = load_rewards([f"{file}:needs"], SimpleNamespace(reward_env=["MY_API_KEY"]))
    assert reward(**rows("a")) == [12345678.0]
    with pytest.raises(RewardError, match="names of environment variables") as refused:
        load_rewards(["format"], SimpleNamespace(reward_env=["sk-canary"]))
    assert "canary" not in str(refused.value)


FAILURES = [
    ("raises", r"mine\.py:8: KeyError: 'colour'.*row 'row-0'", [None] * 3),
    ("hangs", r"must end within 0\.9 s.*row 'row-0'", [None] * 3),
    ("hangs_in_c", r"must end within 0\.9 s.*row 'row-0'", [None] * 3),
    ("hangs_async", r"must end within 0\.9 s.*row 'row-0'", [None] * 3),
    ("exits", r"SystemExit: 7.*row 'row-0'", [None] * 3),
    ("exits_at_once", r"its process ended \(exit code 7\).*row 'row-0'", [None] * 3),
    ("none", "received NoneType", [None] * 3),
    ("nan", "received nan for row 'row-1'", [1.0, None, 1.0]),
    ("inf", "received inf for row 'row-2'", [1.0, 1.0, None]),
    ("text", r"received str '1\.0' for row 'row-0'", [None, 1.0, 1.0]),
    ("short", "received 1; the first row without one is row 'row-1'", [None] * 3),
]


@pytest.mark.parametrize(("name", "message", "rewards"), FAILURES, ids=[case[0] for case in FAILURES])
def test_a_failure_stops_the_run_or_leaves_its_rows_without_the_reward(file, caplog, name, message, rewards):
    started = time.monotonic()
    with pytest.raises(RewardError, match=rf"'{name}'.*{message}"):
        load(file, name)(**rows("a", "b", "c"))
    assert time.monotonic() - started < 3
    metrics = {}
    reward = load(file, name, "skip")
    with caplog.at_level(logging.WARNING):
        assert reward(**rows("a", "b", "c"), log_metric=metrics.__setitem__) == rewards
    assert f"'{name}'" in caplog.text
    assert metrics[f"reward_workers/{name}_failed"] == pytest.approx(rewards.count(None) / 3)
    assert reward(**rows("a", "b", "c")) == rewards  # and again, in a fresh process where the first was killed
    reward.close()


def test_a_megabyte_of_print_is_no_failure(file, capfd):
    assert load(file, "prints")(**rows("a")) == [1.0]
    assert "y" * 1000 in capfd.readouterr().err


def test_inputs_are_copies(file):
    given = rows("a", "b", "c", scene=[{"colours": ["red"]}] * 3)
    assert load(file, "changes")(**given) == [0.5] * 3
    assert len(given["completions"]) == 3 and given["scene"][0] == {"colours": ["red"]}


def test_what_a_function_forks_answers_nothing_and_does_not_outlive_it(file, tmp_path):
    reward = load(file, "forks")
    pid_file = tmp_path / "pid"
    for _ in range(3):
        assert reward(**rows("a", pid_file=[str(pid_file)])) == [1.0]
    assert reward(**rows("stay", pid_file=[str(pid_file)])) == [1.0]
    assert is_running(int(pid_file.read_text()))
    reward.close()
    time.sleep(0.1)
    assert not is_running(int(pid_file.read_text()))


def test_a_good_function_keeps_its_process_and_logs(file):
    reward = load(file, "counts")
    assert [reward(**rows("a"))[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    extras, metrics = {}, {}
    load(file, "logs")(
        **rows("a", "bc"),
        trainer_state=SimpleNamespace(global_step=4, other=object()),
        log_extra=extras.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert extras == {"length": [1, 1]} and metrics == {"step": 4.0}


def test_a_column_that_cannot_be_handed_over_is_named(file):
    with pytest.raises(RewardError, match=r"column 'scene' holds a builtins\.object"):
        load(file, "good")(**rows("a", scene=[object()]))


@pytest.mark.parametrize(
    "value",
    [{"a": [1, None, "x"]}, {1: (2, 3)}, {"$a": {1}}, b"\x00\xff", "\ud800", numpy.float32(0.5), float("inf")],
)
def test_values_arrive_as_they_were(value):
    assert from_json(to_json(value)) == value


def test_images_and_arrays_arrive_as_they_were():
    image = Image.effect_noise((8, 8), 50)
    assert from_json(to_json(image)).tobytes() == image.tobytes()
    assert from_json(to_json(numpy.eye(2))).tolist() == numpy.eye(2).tolist()


def test_closing_ends_a_call_of_another_thread(file):
    """A reward that hangs while others are sampled must not keep a run from ending."""
    (reward,) = load_rewards([f"{file}:hangs"], SimpleNamespace(reward_timeout_s=30.0))
    errors = []

    def call():
        with pytest.raises(RewardError) as error:
            reward(**rows("a"))
        errors.append(str(error.value))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    reward.close()
    thread.join(5)
    assert time.monotonic() - started < 5 and "its process ended (signal SIGKILL)" in errors[0]


def test_the_process_ends_with_the_trainer_and_outlives_the_thread_that_made_it(file):
    script = f"""
import threading, os, signal
from r1v_rl.scoring import load_rewards
made = []
thread = threading.Thread(target=lambda: made.extend(load_rewards(["{file}:counts"])))
thread.start(); thread.join()
rows = dict(prompts=[""], completions=["a"], id=["r"])
assert made[0](**rows) == [1.0] and made[0](**rows) == [2.0]
print(made[0]._function._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    source = str(Path(__file__).parents[2] / "src")
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True
    )
    assert run.stdout, run.stderr
    for _ in range(50):
        if not is_running(int(run.stdout)):
            return
        time.sleep(0.1)
    raise AssertionError("the reward's process outlived the trainer")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
