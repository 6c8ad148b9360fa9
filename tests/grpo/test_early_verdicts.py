"""Verdicts that begin while other groups are sampled: those of the end, errors by name, nothing left behind."""

import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from grpo.background import AHEAD, BackgroundTransformers
from grpo.tiny_run import ROWS, make_trainer, token_reward
from random_vlm import picture, save_random_vlm

from r1v_rl.errors import RewardError, UserError
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.verdicts import EarlyVerdicts, column_names, said_of
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.state_files import weight_hash
from r1v_rl.tracking.completions import read_rollouts
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.types import Completion, Example, RolloutGroup

VLLM = {"use_vllm": True, "vllm_kv_cache_memory_bytes": 2**27, "vllm_max_model_length": 256, "save_strategy": "no"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def early(function):
    """A function of the same name and effect that says it judges each completion by itself."""

    def asked(**arguments):
        return function(**arguments)

    asked.__name__, asked.per_completion = function.__name__, True
    return asked


def reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reward ")]


def assert_no_thread_is_left(within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while reward_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not reward_threads()


def logging_reward(completion_ids, id, log_extra, log_metric, **_):
    time.sleep(0.003)
    log_extra("row", list(id))
    log_extra("half", list(id)[: len(id) // 2])
    log_metric("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return [
        None if len(ids) == 3 else reward
        for ids, reward in zip(completion_ids, token_reward(completion_ids), strict=True)
    ]


def slow_reward(completion_ids, **_):
    time.sleep(0.05 * len(completion_ids))
    return token_reward(completion_ids)


def groups_of(num_groups: int, size: int = 3) -> list[RolloutGroup]:
    draw = random.Random(5)
    groups = []
    for row in range(num_groups):
        ids = [[draw.randrange(300) for _ in range(draw.randrange(1, 6))] for _ in range(size)]
        example = Example(f"row{row}", [], (), None, {"hint": "h"} if row == 3 else {})
        groups.append(RolloutGroup(example, [], [Completion(i, [], "", False) for i in ids], 0))
    return groups


# ---- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_however_groups_are_shared_out_the_same_is_said(seed):
    """Eight groups, added in any order at any time; one call with all of them is the slow twin."""
    groups, draw = groups_of(8), random.Random(seed)
    (function,) = load_rewards([early(logging_reward)])
    examples = [group.example for group in groups]
    wanted = said_of(function, groups, column_names(examples), None)
    verdicts = EarlyVerdicts([function], examples, None)
    for number in draw.sample(range(8), 6):
        verdicts.add(number, groups[number])
        time.sleep(draw.choice([0.0, 0.001, 0.01]))
    verdicts.add_rest(groups)
    found = verdicts.of(function)
    assert len(verdicts._queues["logging_reward"]._calls) > 1
    assert found.rewards == wanted.rewards and None in found.rewards
    assert found.extra["row"] == wanted.extra["row"] == [f"row{i // 3}" for i in range(24)]
    assert len(found.extra["half"]) == 24
    assert found.scalars["tokens"] == pytest.approx(wanted.scalars["tokens"])
    assert verdicts.seconds > 0.003
    assert_no_thread_is_left()


def test_every_call_has_the_columns_of_all_rows():
    seen = []

    @early
    def wants_a_hint(completions, hint, **_):
        seen.extend(hint)
        return [0.0] * len(completions)

    groups = groups_of(5)
    (function,) = load_rewards([wants_a_hint])
    verdicts = EarlyVerdicts([function], [group.example for group in groups], None)
    for number, group in enumerate(groups):
        verdicts.add(number, group)
        time.sleep(0.01)
    assert verdicts.of(function).rewards == [0.0] * 15 and sorted(seen, key=str) == [None] * 12 + ["h"] * 3


def test_one_call_at_a_time_over_two_generations():
    """Ahead of the trainer two generations are judged at once; a function that keeps replies must not be."""
    inside, most = [], []

    @early
    def alone(completions, **_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return [0.0] * len(completions)

    groups = groups_of(6)
    (function,) = load_rewards([alone])
    generations = [EarlyVerdicts([function], [group.example for group in groups], None) for _ in range(2)]
    for number, group in enumerate(groups):
        for verdicts in generations:
            verdicts.add(number, group)
    assert all(verdicts.of(function).rewards == [0.0] * 18 for verdicts in generations) and max(most) == 1


def test_only_what_says_so_is_asked_early(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def plain(completions, **_):\n    return [0.0] * len(completions)\n"
        "def single(completions, **_):\n    return [0.0] * len(completions)\nsingle.per_completion = True\n"
        "def compute_score(reward_inputs):\n    return [{'overall': 0.0} for _ in reward_inputs]\n"
        "compute_score.per_completion = True\n"
    )
    names = ["accuracy", "format", "length", f"{file}:plain", f"{file}:single", f"{file}:compute_score", token_reward]
    stage = RewardStage(names, make_trainer(model, tmp_path).args)
    assert [f.name for f in stage.functions if f.per_completion] == ["single", "compute_score"]
    assert stage.early([], None) is not None
    assert RewardStage(["accuracy", "format", token_reward], stage._args).early([], None) is None
    for function in stage.functions:
        function.close()


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"dynamic_sampling": 2}, {**AHEAD, "max_staleness": 1}],
    ids=["on policy", "replaced groups", "ahead"],
)
def test_a_run_is_the_one_whose_groups_are_judged_at_the_end(model, tmp_path, changes):
    hashes, records = [], []
    for name, reward in (("late", logging_reward), ("early", early(logging_reward))):
        trainer = make_trainer(
            model, tmp_path / name, max_steps=4, save_strategy="no", save_rollouts=True, adam_epsilon=1e-8, **changes
        )
        trainer.reward_stage = RewardStage([token_reward, reward], trainer.args)
        if "max_staleness" in changes:
            BackgroundTransformers(trainer)
        trainer.train()
        hashes.append(weight_hash(trainer.model.state_dict()))
        records.append(read_rollouts(tmp_path / name).to_pylist())
    assert hashes[0] == hashes[1]
    for late, soon in zip(*records, strict=True):
        names = ["example_id", "reward", "advantage", "token_ids", "extra/row"]
        assert [late[name] for name in names] == [soon[name] for name in names]
    lines = [line for line in read_metrics(tmp_path / "early") if "rollout/seconds_reward" in line]
    assert all("rollout/seconds_reward_early" in line for line in lines) and len(lines) == 4
    assert not any("rollout/seconds_reward_early" in line for line in read_metrics(tmp_path / "late"))
    assert_no_thread_is_left()


def test_with_vllm_a_slow_reward_is_judged_while_the_rest_is_sampled(model, tmp_path):
    """Real vLLM; of two groups one is finished after a token, the other after 150: 0.2 s of verdicts each. The same
    rewards and advantages as at the end, where all of it is waited for."""
    trainer = make_trainer(model, tmp_path, **VLLM)
    trainer._sampling = lambda: Sampling(num_generations=4, max_tokens=[1, 150])
    trainer.reward_stage = stage = RewardStage([early(slow_reward)], trainer.args)
    rollouts = trainer._sampled(0)
    judged_s = rollouts.early.seconds
    results, waited = [], []
    for verdicts in (rollouts.early, None):
        started = time.perf_counter()
        results.append(stage(rollouts.groups, trainer.accelerator, trainer.state, verdicts))
        waited.append(time.perf_counter() - started)
    for name in ("per_function", "rewards", "advantages"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert judged_s > 0 and waited[1] >= 0.4 and waited[0] < waited[1] - judged_s / 2, (judged_s, waited)
    assert_no_thread_is_left()


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_amid_the_sampling_names_function_and_row(model, tmp_path):
    def picky(completion_ids, id, **_):
        if "row1" in id:
            raise ZeroDivisionError("no such colour")
        return token_reward(completion_ids)

    for name, reward in (("late", picky), ("early", early(picky))):
        trainer = make_trainer(model, tmp_path / name, max_steps=5)
        trainer.reward_stage = RewardStage([reward], trainer.args)
        with pytest.raises(RewardError, match=r"reward function 'picky'.*ZeroDivisionError: no such colour.*row 'row"):
            trainer.train()
    assert_no_thread_is_left()


def test_a_skipped_failure_costs_no_more_rows_than_at_the_end(model, tmp_path):
    def picky(completion_ids, id, **_):
        if "row1" in id:
            raise ZeroDivisionError
        return token_reward(completion_ids)

    trainer = make_trainer(model, tmp_path, max_steps=4, save_strategy="no", reward_failure="skip")
    trainer.reward_stage = RewardStage([early(picky)], trainer.args)
    trainer.train()
    failed = [line["reward_workers/picky_failed"] for line in read_metrics(tmp_path) if "loss" in line]
    asked = ["row1" in [ROWS[row]["id"] for row in trainer.sampler.prompts(g, 0, 1)] for g in range(4)]
    assert [share > 0 for share in failed] == asked and set(failed) <= {0.0, 0.5, 1.0}


class Interrupted(TransformersEngine):
    """Finishes two groups, then is lost or stopped by Ctrl-C."""

    def __init__(self, error: BaseException, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.error = error

    def generate(self, prompts, sampling, *, seed, on_group=None):
        for number, group in enumerate(super().generate(prompts, sampling, seed=seed)[:2]):
            on_group(number, group)
            time.sleep(0.05)
        raise self.error


@pytest.mark.parametrize("error", [UserError("no rollout server is left"), KeyboardInterrupt()], ids=["lost", "Ctrl-C"])
def test_sampling_that_ends_early_leaves_no_verdict_under_way(model, tmp_path, error):
    calls = []

    @early
    def slow(completions, **_):
        calls.append(len(completions))
        time.sleep(0.3)
        return [0.0] * len(completions)

    trainer = make_trainer(model, tmp_path, max_steps=1, save_strategy="no", per_device_train_batch_size=16)
    trainer._engine = Interrupted(error, trainer.model, trainer._tokenizer, eos_token_ids=[2], banned_token_ids=[])
    trainer.reward_stage = RewardStage([slow], trainer.args)
    with pytest.raises(type(error)):
        trainer.train()
    assert_no_thread_is_left(2.0)
    assert calls == [4], "what waited was dropped"


RUN = """
model_name_or_path: {folder}/model
dataset_name: {folder}/rows.jsonl
output_dir: {folder}/run
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 8
max_steps: 5
bf16: false
use_cpu: true
gradient_checkpointing: false
save_strategy: "no"
report_to: []
reward_funcs: ["{folder}/mine.py:mine"]
"""
MINE = """
import os, time

def mine(completions, id, trainer_state, **_):
    open("{folder}/pid", "w").write(str(os.getpid()))
    if trainer_state.global_step and "r1" in id:
        {fault}
    return [len(completion[0]["content"]) % 5 / 5 for completion in completions]

mine.per_completion = True
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise KeyError('colour')", "KeyError: 'colour'"), ("time.sleep(3600)", "must end within")],
    ids=["raises", "hangs"],
)
def test_a_run_whose_reward_fails_early_ends_with_its_message(model, tmp_path, fault, message):
    """From the command line: exit code 2, function and row, no traceback, and the reward's process is gone."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "mine.py").write_text(MINE.format(folder=tmp_path, fault=fault))
    (tmp_path / "recipe.yaml").write_text(RUN.format(folder=tmp_path))
    rows = [{"id": f"r{i}", "problem": "<image> How many?", "answer": "1", "images": [f"{i}.png"]} for i in range(4)]
    for i, row in enumerate(rows):
        picture(i).save(tmp_path / row["images"][0])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "r1v_rl", "grpo", "--config", str(tmp_path / "recipe.yaml")]
    run = subprocess.run(
        [*command, "--reward_timeout_s", "0.5"], capture_output=True, text=True, timeout=200, env=os.environ
    )
    assert run.returncode == 2, run.stdout + run.stderr
    said = run.stdout + run.stderr
    assert "reward function 'mine'" in said and message in said and "row 'r" in said and "Traceback" not in said
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}")
