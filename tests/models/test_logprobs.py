"""Logits that are computed once give the scores and the gradients of TRL's kernel, which computes them twice."""

import pytest
import torch
from random_vlm import random_vlm

from r1v_rl.models import logprobs
from r1v_rl.models.logprobs import Scored, add_logprob_head
from r1v_rl.models.parts import freeze_all_but

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])


@pytest.fixture
def calls(monkeypatch):
    """Which way each call of the head took."""
    seen = []

    def spy(name: str):
        real = getattr(logprobs, name).apply
        monkeypatch.setattr(getattr(logprobs, name), "apply", lambda *args: (seen.append(name), real(*args))[1])

    spy("_HeadOnce")
    spy("ChunkedLogProbFunction")
    return seen


def scores_and_gradients(*, once: bool, frozen: bool, temperature: float = 1.0, autocast: bool = False):
    """Scores, and gradients by name, those of the head and of one layer."""
    model, _ = random_vlm()
    freeze_all_but(model, ["projector", "language_model"])
    model.lm_head.weight.requires_grad_(not frozen)
    add_logprob_head(model, temperature=temperature, float32_head=False, logprobs_only=once, top1=True)
    ids = torch.randint(40, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    scored = Scored(torch.tensor([3, 4, 9, 15, 20]), torch.tensor([50, 60, 70, 80, 90]), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = model(input_ids=ids, scored=scored)
    (scores.logprobs * WEIGHTS).sum().backward()
    up = model.model.language_model.layers[0].mlp.up_proj.weight.grad
    return scores, {"up_proj": up} if frozen else {"up_proj": up, "head": model.lm_head.weight.grad}


def largest_error(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    assert expected.keys() == found.keys()
    return max(((found[name] - g).norm() / g.norm()).item() for name, g in expected.items())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("frozen", "at_once", "way"),
    [
        (True, 1, "_HeadOnce"),
        (True, 2000, "_HeadOnce"),
        (True, 1 << 25, "_HeadOnce"),
        (False, 1 << 25, "_HeadOnce"),
        (False, 2000, "ChunkedLogProbFunction"),  # too many to be kept
    ],
)
def test_logits_computed_once_are_those_computed_twice(calls, monkeypatch, temperature, frozen, at_once, way):
    """Whatever the weight of a token in the loss, and however many tokens' logits are computed at once."""
    expected, gradients = scores_and_gradients(once=False, frozen=frozen, temperature=temperature)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
    got, found = scores_and_gradients(once=True, frozen=frozen, temperature=temperature)
    assert calls == ["ChunkedLogProbFunction", way]
    assert torch.allclose(got.logprobs, expected.logprobs, atol=1e-6)
    assert torch.allclose(got.entropies, expected.entropies, atol=1e-5)
    assert torch.equal(got.is_top1, expected.is_top1)
    assert largest_error(gradients, found) < 1e-5


def test_a_bias_trains_a_head_too(calls, monkeypatch):
    """As with PEFT's `bias: all`: more logits than are kept would leave it without a part of its gradient."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 2000)
    model, _ = random_vlm()
    freeze_all_but(model, [])
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    add_logprob_head(model, temperature=1.0, float32_head=False, logprobs_only=True)
    scored = Scored(torch.arange(5), torch.arange(50, 55), None)
    model(input_ids=torch.arange(40, 52)[None], scored=scored).logprobs.sum().backward()
    assert calls == ["ChunkedLogProbFunction"] and model.lm_head.bias.grad[50:55].min() > 0


@pytest.mark.parametrize("once", [True, False])
def test_a_float32_head_has_a_float32_bias(once):
    model = random_vlm()[0].bfloat16()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(model.lm_head.weight.shape[0], dtype=torch.bfloat16))
    add_logprob_head(model, temperature=1.0, float32_head=True, logprobs_only=once)
    scored = Scored(torch.arange(5), torch.arange(50, 55), None)
    model(input_ids=torch.arange(40, 52)[None], scored=scored).logprobs.sum().backward()
    assert model.lm_head.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [True, False])
def test_in_bfloat16_only_a_head_that_does_not_train_has_them_once(calls, frozen):
    expected, gradients = scores_and_gradients(once=False, frozen=frozen, autocast=True)
    got, found = scores_and_gradients(once=True, frozen=frozen, autocast=True)
    assert calls == ["ChunkedLogProbFunction", "_HeadOnce" if frozen else "ChunkedLogProbFunction"]
    assert torch.allclose(got.logprobs, expected.logprobs, atol=0.05)
    assert largest_error(gradients, found) < 0.02


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("trained", [(True,) * 3, (False, True, False), (True, False, True), (False, False, True)])
def test_each_gradient_is_that_of_plain_math(tokens, trained):
    """Of hidden states, weight and bias, whichever of them train."""
    torch.manual_seed(0)
    inputs = torch.randn(tokens, 8), torch.randn(30, 8), torch.randn(30)
    targets, weights = torch.randint(30, (tokens,)), torch.randn(tokens)
    plain = [x.clone().requires_grad_(trains) for x, trains in zip(inputs, trained, strict=True)]
    once = [x.clone().requires_grad_(trains) for x, trains in zip(inputs, trained, strict=True)]
    expected = (torch.nn.functional.linear(*plain) / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found, *_ = logprobs._HeadOnce.apply(*once, targets, 0.7, False)
    assert torch.allclose(found, expected, atol=1e-6)
    for scores in (expected, found):
        (scores * weights).sum().backward()
    for a, b, trains in zip(plain, once, trained, strict=True):
        assert (b.grad is not None) == trains
        assert not trains or torch.allclose(a.grad, b.grad, atol=1e-6)
