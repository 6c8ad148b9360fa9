"""The loss against numbers worked by hand; tests/parity holds it against TRL's."""

import math

import pytest
import torch

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.loss import (
    LossInputs,
    Normalisation,
    importance_ratio,
    kl_to_reference,
    policy_loss,
    sampler_correction,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.fixture()
def settings(tmp_path):
    return lambda **keys: GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, bf16=False, **keys
    )


def inputs(old: list[list[float]], advantages: list[float]) -> LossInputs:
    """Policy log-probabilities of zero everywhere: ratios are exp(-old)."""
    zeros = torch.zeros(2, 3, requires_grad=True)
    return LossInputs(zeros, torch.ones(2, 3), torch.tensor(advantages), MASK, torch.tensor(old))


def loss_value(args: GRPOConfig, old: list[list[float]], advantages: list[float], tokens: float = 4.0) -> float:
    return policy_loss(inputs(old, advantages), args, Normalisation(1, torch.tensor(tokens)))[0].item()


SAME = [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [
        ("dapo", -(3 * 2.0 + 1 * -1.0) / 4),  # all four tokens weigh the same
        ("grpo", -(2.0 + -1.0) / 2),  # both rows weigh the same
        ("bnpo", -(3 * 2.0 + 1 * -1.0) / 4),
        ("dr_grpo", -(3 * 2.0 + 1 * -1.0) / (2 * 10)),  # rows times max_completion_length
        ("luspo", -(3 * 2.0 + 1 * -1.0) / 2),
    ],
)
def test_what_each_loss_type_divides_by(settings, loss_type, wanted):
    args = settings(loss_type=loss_type, max_completion_length=10)
    assert loss_value(args, SAME, [2.0, -1.0]) == pytest.approx(wanted)


def test_clipping_holds_the_ratio_only_where_it_would_gain(settings):
    double = [[-math.log(2)] * 3] * 2  # ratio 2
    args = settings(loss_type="grpo", epsilon=0.2)
    assert loss_value(args, double, [1.0, 0.0]) == pytest.approx(-1.2 / 2)
    assert loss_value(args, double, [-1.0, 0.0]) == pytest.approx(2.0 / 2), "no clip against a bad action"
    assert loss_value(settings(loss_type="grpo", delta=1.5), double, [-1.0, 0.0]) == pytest.approx(1.5 / 2)
    assert loss_value(settings(loss_type="grpo", epsilon_high=0.5), double, [1.0, 0.0]) == pytest.approx(-1.5 / 2)


def test_a_clipped_token_has_no_gradient(settings):
    batch = inputs([[-math.log(2)] * 3, [0.0] * 3], [1.0, 1.0])
    policy_loss(batch, settings(), Normalisation(1, torch.tensor(4.0)))[0].backward()
    assert torch.equal(batch.logprobs.grad[0], torch.zeros(3))
    assert batch.logprobs.grad[1, 0] == pytest.approx(-0.25)


def test_padding_and_other_rows_do_not_matter(settings):
    batch = inputs(SAME, [2.0, -1.0])
    policy_loss(batch, settings(), Normalisation(1, torch.tensor(4.0)))[0].backward()
    assert torch.equal(batch.logprobs.grad != 0, MASK)


def test_sequence_ratio_is_a_geometric_mean():
    old = torch.tensor([[0.3, 0.0, 0.0], [0.3, 9.0, 9.0]])
    ratio = importance_ratio(torch.zeros(2, 3), old, MASK.float(), level="sequence")
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(-0.1)], [math.exp(-0.3)]]))


def test_kl_is_zero_where_equal_and_positive_elsewhere():
    kl = kl_to_reference(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, -0.1]]))
    torch.testing.assert_close(kl, torch.tensor([[0.0, math.exp(0.1) - 1.1, math.exp(-0.1) - 0.9]]))


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("token_mask", [1.0, 0.0, 2.0]),
        ("token_truncate", [1.0, 3.0, 2.0]),
        ("sequence_mask", [0.0]),
        ("sequence_truncate", [3.0]),
    ],
)
def test_sampler_correction(settings, mode, wanted):
    """Ratios 1, 4 and 2 with a cap of 3; the sequence's is 8."""
    sampler = -torch.tensor([[1.0, 4.0, 2.0]]).log()
    args = settings(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=3.0)
    got = sampler_correction(torch.zeros(1, 3), sampler, torch.ones(1, 3), args)
    torch.testing.assert_close(got, torch.tensor([wanted]))


def test_a_token_without_a_sampler_logprob_counts_as_equal(settings):
    got = sampler_correction(torch.zeros(1, 2), torch.tensor([[math.nan, 0.0]]), torch.ones(1, 2), settings())
    assert torch.equal(got, torch.ones(1, 2))


def test_long_chains_survive_rounding_noise_token_by_token(settings):
    """TRL's default sums the noise of 8,000 tokens into one ratio; ours looks at each token."""
    noise = 0.02 * torch.randn(200, 8000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(noise)
    kept = {
        mode: (
            sampler_correction(noise, torch.zeros_like(noise), mask, settings(vllm_importance_sampling_mode=mode)) > 0
        )
        for mode in ("token_mask", "sequence_mask")
    }
    assert kept["token_mask"].all()
    assert 0.1 < 1 - kept["sequence_mask"].float().mean() < 0.5
