"""A head that does not train gives the scores and the gradients of one that does."""

import pytest
import torch
from random_vlm import random_vlm

from r1v_rl.models import logprobs
from r1v_rl.models.logprobs import Scored, add_logprob_head
from r1v_rl.models.parts import freeze_all_but


def scores_and_gradient(frozen: bool, temperature: float, weights: torch.Tensor, autocast: bool = False):
    model, _ = random_vlm()
    freeze_all_but(model, ["projector", "language_model"])
    model.lm_head.weight.requires_grad_(not frozen)
    add_logprob_head(model, temperature=temperature, float32_head=False, logprobs_only=True, top1=True)
    ids = torch.randint(40, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    scored = Scored(torch.tensor([3, 4, 9, 15, 20]), torch.tensor([50, 60, 70, 80, 90]), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = model(input_ids=ids, scored=scored)
    (scores.logprobs * weights).sum().backward()
    return scores, model.model.language_model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [1, 2000, 1 << 25])
def test_a_frozen_head_equals_a_trainable_one(monkeypatch, temperature, at_once):
    """Whatever the weight of a token in the loss, and however many tokens' logits are computed at once."""
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    expected, gradient = scores_and_gradient(False, temperature, weights)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
    got, other = scores_and_gradient(True, temperature, weights)
    assert torch.allclose(got.logprobs, expected.logprobs, atol=1e-6)
    assert torch.allclose(got.entropies, expected.entropies, atol=1e-5)
    assert torch.equal(got.is_top1, expected.is_top1)
    assert (gradient - other).norm() / gradient.norm() < 1e-5


def test_in_bfloat16_too():
    weights = torch.ones(5)
    expected, gradient = scores_and_gradient(False, 1.0, weights, autocast=True)
    got, other = scores_and_gradient(True, 1.0, weights, autocast=True)
    assert torch.allclose(got.logprobs, expected.logprobs, atol=0.05)
    assert (gradient - other).norm() / gradient.norm() < 0.02
