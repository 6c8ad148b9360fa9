"""Groups whose rewards are all equal give way to fresh prompts: which, how often, exactly again, on two processes."""

import json
import math

import pytest
import torch
from grpo.background import resample_on_two
from grpo.engine_run import two_processes
from grpo.tiny_run import make_trainer, token_reward
from random_vlm import save_random_vlm

from r1v_rl.grpo.rewards import Rewarded, RewardStage
from r1v_rl.grpo.rollouts import differs
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.state_files import weight_hash
from r1v_rl.tracking.completions import read_rollouts
from r1v_rl.tracking.metrics import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def odd_rows_are_alike(completion_ids, id, log_extra, **_):
    """Rows with an odd number teach nothing."""
    log_extra("asked", list(id))
    rewards = token_reward(completion_ids)
    return [0.5 if int(row[-1]) % 2 else reward for row, reward in zip(id, rewards, strict=True)]


def run(model, folder, rounds, reward=odd_rows_are_alike, resume=None, **changes):
    trainer = make_trainer(model, folder, dynamic_sampling=rounds, max_steps=4, save_rollouts=True, **changes)
    trainer.reward_stage = RewardStage([reward], trainer.args)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(folder, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def odd(trainer, generation: int) -> int:
    return sum(row % 2 for row in trainer.sampler.prompts(generation, 0, 1))


def test_alike_groups_are_replaced_and_counted(model, tmp_path):
    """Two prompts of eight a generation, four of which teach: three rounds ask all others where need be."""
    trainer = run(model, tmp_path, 3)
    assert logged(tmp_path, "frac_reward_zero_std") == [0.0] * 4
    wanted = [odd(trainer, generation) / 2 for generation in range(4)]
    assert logged(tmp_path, "dynamic_sampling/replaced") == wanted and sum(wanted) > 0
    rounds = logged(tmp_path, "dynamic_sampling/rounds")
    assert [number > 0 for number in rounds] == [share > 0 for share in wanted]
    stored = read_rollouts(tmp_path).to_pylist()
    assert len(stored) == 4 * 8
    for record in stored:
        assert record["extra/asked"] == record["example_id"] and int(record["example_id"][-1]) % 2 == 0
        assert record["reward"] == pytest.approx(token_reward([record["token_ids"]])[0])
    for step in range(4):
        rewards = torch.tensor([r["reward"] for r in stored if r["step"] == step]).view(2, 4)
        advantages = torch.tensor([r["advantage"] for r in stored if r["step"] == step]).view(2, 4)
        centred = rewards - rewards.mean(1, keepdim=True)
        torch.testing.assert_close(advantages, centred / (rewards.std(1, keepdim=True) + 1e-4))
    assert logged(tmp_path, "reward") != logged(tmp_path, "dynamic_sampling/reward")


def test_off_by_default_and_limited(model, tmp_path):
    trainer = run(model, tmp_path / "off", 0)
    assert logged(tmp_path / "off", "frac_reward_zero_std") == [odd(trainer, g) / 2 for g in range(4)]
    assert not logged(tmp_path / "off", "dynamic_sampling/replaced")
    limited = run(model, tmp_path / "limited", 1, reward=lambda completion_ids, **_: [1.0] * len(completion_ids))
    assert logged(tmp_path / "limited", "dynamic_sampling/rounds") == [1.0] * 4
    assert logged(tmp_path / "limited", "dynamic_sampling/replaced") == [0.0] * 4
    assert logged(tmp_path / "limited", "frac_reward_zero_std") == [1.0] * 4
    rows = [f"row{row}" for g in range(4) for row in limited.sampler.prompts(g, 0, 1) for _ in range(4)]
    assert [record["example_id"] for record in read_rollouts(tmp_path / "limited").to_pylist()] == rows


def test_a_run_goes_on_exactly_inside_a_generation_of_replaced_groups(model, tmp_path):
    wanted = run(model, tmp_path, 3, num_iterations=2)
    assert logged(tmp_path, "dynamic_sampling/replaced") == [odd(wanted, 0) / 2, odd(wanted, 1) / 2] != [0.0, 0.0]
    for step in (1, 3):
        resumed = run(model, tmp_path, 3, num_iterations=2, resume=str(tmp_path / f"checkpoint-{step}"))
        assert weight_hash(resumed.model.state_dict()) == weight_hash(wanted.model.state_dict()), step


def test_two_processes_ask_as_often_and_for_other_rows(model, tmp_path):
    """DDP, rollouts on policy and ahead of it: one process may have nothing to replace where the other has."""
    two_processes("ddp", resample_on_two, model, tmp_path)
    for name in ("on policy", "ahead"):
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert first["rounds"] == second["rounds"] and max(first["rounds"]) > 0, name
        if name == "on policy":  # ahead of it both have as many
            assert first["replaced"] != second["replaced"]
        assert first["weights"] == second["weights"], name
        for rows, others in zip(first["rows"], second["rows"], strict=True):
            assert not set(rows) & set(others), name
    assert first["staleness"] == second["staleness"] == [0, 1, 1, 1]


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_groups_that_teach():
    nan = math.nan
    rows = [[0.0, 1.0], [1.0, 1.0], [nan, 1.0], [nan, nan], [nan, 0.5, 0.0]]
    assert [differs(torch.tensor(row)) for row in rows] == [True, False, False, False, True]


@pytest.mark.parametrize("shuffle", [True, False])
def test_spare_rows_are_of_no_process_twice_and_follow_from_the_generation(shuffle):
    sampler = PromptSampler(10, prompts_per_generation=4, micro_steps_per_generation=1, shuffle=shuffle, seed=3)
    shares = [sampler.spare(1, rank, 2) for rank in (0, 1)]
    assert sorted([*sampler.prompts(1, 0, 1), *shares[0], *shares[1]]) == list(range(10))
    assert shares == [sampler.spare(1, rank, 2) for rank in (0, 1)]
    if shuffle:
        assert sampler.spare(1, 0, 1) != [row for row in sampler.spare(0, 0, 1) if row not in sampler.prompts(1, 0, 1)]
    else:
        assert sampler.spare(1, 0, 1) == [8, 9, 0, 1, 2, 3]


def test_rewards_of_a_group_take_the_place_of_another():
    def rewarded(value: float, extra: dict) -> Rewarded:
        rewards = torch.full((2, 2), value)
        return Rewarded(["f"], rewards[..., None].clone(), rewards.clone(), torch.zeros(2, 2), extra)

    first = rewarded(0.0, {"both": [0, 1, 2, 3], "short": [9]})
    first.replace(1, rewarded(1.0, {"both": [10, 11, 12, 13], "new": [5, 6]}), 0)
    assert first.rewards.tolist() == first.per_function[..., 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert first.extra == {
        "both": [0, 1, 10, 11], "short": [9, None, None, None], "new": [None, None, 5, 6],
    }  # fmt: skip
