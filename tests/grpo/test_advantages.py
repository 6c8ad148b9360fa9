"""Advantages against numbers worked by hand."""

import math

import pytest
import torch

from r1v_rl.grpo.advantages import group_advantages, nan_std, normalised_sum_advantages, weighted_rewards

NAN = math.nan


def test_group_scaling_centres_and_divides_by_the_sample_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    got = group_advantages(rewards, scale="group")
    deviation = math.sqrt(1 / 3)  # of 1, 0, 0, 1 with n - 1
    torch.testing.assert_close(got[0], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-4))
    assert torch.equal(got[1], torch.zeros(4))


def test_no_scaling_leaves_the_differences():
    got = group_advantages(torch.tensor([[3.0, 1.0]]), scale="none")
    torch.testing.assert_close(got, torch.tensor([[1.0, -1.0]]))


def test_batch_scaling_divides_all_groups_by_one_number():
    rewards = torch.tensor([[3.0, 1.0], [10.0, 0.0]])
    got = group_advantages(rewards, scale="batch", batch_std=torch.tensor(2.0))
    torch.testing.assert_close(got, torch.tensor([[1.0, -1.0], [5.0, -5.0]]) / 2.0001)


def test_a_completion_that_nothing_could_judge_has_no_part_in_its_group():
    got = group_advantages(torch.tensor([[1.0, 0.0, NAN]]), scale="none")
    torch.testing.assert_close(got, torch.tensor([[0.5, -0.5, 0.0]]))


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.tensor([[1.0]]), scale="group")


def test_weighted_sum_counts_what_could_be_judged():
    rewards = torch.tensor([[[1.0, 0.5], [NAN, 0.5], [NAN, NAN]]])
    got = weighted_rewards(rewards, torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(got, torch.tensor([[0.9, 0.1, NAN]]), equal_nan=True)


def test_normalise_then_sum_gives_every_reward_the_same_voice():
    """The second reward is a hundred times the first; where they disagree, they cancel."""
    rewards = torch.tensor([[[0.0, 0.0], [1.0, 100.0], [0.0, 100.0], [1.0, 0.0]]])
    got = normalised_sum_advantages(rewards, torch.tensor([1.0, 1.0]))[0]
    assert got[:2].tolist() == pytest.approx([-1.2247, 1.2247], abs=1e-3)
    assert got[2:].abs().max() < 1e-3


def test_nan_std_is_the_sample_deviation():
    values = torch.tensor([[1.0, 2.0, NAN, 4.0], [1.0, NAN, NAN, NAN]])
    got = nan_std(values, dim=1)
    assert got[0].item() == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
    assert got[1].isnan()


def test_equal_rewards_give_exactly_zero():
    """The mean of seven times 0.1 is not 0.1 in float32; what is no number is left out."""
    rewards = torch.full((2, 7), 0.1)
    rewards[1, 3] = torch.nan
    assert (rewards - rewards.mean(1, keepdim=True))[0].abs().max() > 0
    assert group_advantages(rewards, scale="group").eq(0).all()
