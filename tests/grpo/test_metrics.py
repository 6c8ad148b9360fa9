"""Metrics: TRL's names, averages that leave NaN out, extremes kept as extremes."""

import math

import pytest
import torch
from accelerate import Accelerator

from r1v_rl.grpo.metrics import Metrics, entropy_mask, masked_mean


@pytest.fixture()
def metrics():
    return Metrics(Accelerator(cpu=True))


def test_averages_over_time_and_leaves_nan_out(metrics):
    for value in (1.0, math.nan, 3.0):
        metrics.add("reward", value)
    metrics.add("kl", math.nan)
    assert metrics.flush() == {"kl": None, "reward": 2.0}
    assert metrics.flush() == {}


def test_extremes_stay_extremes(metrics):
    for value in (1.0, 5.0):
        metrics.add("completions/max_length", value)
        metrics.add("completions/min_length", value)
        metrics.add("sampling/sampling_logp_difference/max", value)
    assert metrics.flush() == {
        "completions/max_length": 5.0,
        "completions/min_length": 1.0,
        "sampling/sampling_logp_difference/max": 5.0,
    }


def test_masked_mean_counts_tokens_or_rows():
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_mean(torch.tensor([[1.0, 2.0], [6.0, 99.0]]), mask) == 3.0
    assert masked_mean(torch.tensor([[1.0], [3.0]]), mask) == 2.0
    assert math.isnan(masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)))


def test_entropy_mask_keeps_the_most_uncertain_tokens():
    entropies = torch.tensor([[0.1, 0.9, 0.5, 7.0], [0.3, 0.8, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    kept = entropy_mask(entropies, mask, 0.4, Accelerator(cpu=True))
    assert kept.tolist() == [[False, True, False, False], [False, True, False, False]]
    assert entropy_mask(entropies, mask, 1.0, Accelerator(cpu=True)) is None
