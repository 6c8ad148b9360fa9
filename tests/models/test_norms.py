"""The norms' own backward pass gives what torch's gives."""

import copy
import pickle

import pytest
import torch
from random_vlm import random_vlm
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from r1v_rl.models import norms
from r1v_rl.models.norms import fuse_norms


def output_and_gradients(model, *, autocast: bool = False):
    ids = torch.randint(40, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
    (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    seen, real = [], norms._RMSNorm.apply
    monkeypatch.setattr(norms._RMSNorm, "apply", lambda *args: (seen.append(1), real(*args))[1])
    return seen


@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("frozen", [True, False])
def test_outputs_and_gradients_are_as_before(calls, family, frozen):
    """Qwen3 has norms of queries and keys too; of frozen ones the gradient goes on to what is before them."""
    model, _ = random_vlm(text_config_class=family)
    for name, parameter in model.named_parameters():
        if name.split(".")[-2].endswith("norm"):
            torch.nn.init.normal_(parameter, 1.0, 0.3).requires_grad_(not frozen)
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    fuse_norms(fused)
    fused = copy.deepcopy(fused)
    expected, gradients = output_and_gradients(model)
    assert not calls
    found, others = output_and_gradients(fused)
    layers = len(model.model.language_model.layers)
    assert len(calls) == layers * (4 if family is Qwen3Config else 2) + 1
    assert torch.allclose(found, expected, atol=1e-5)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_in_lower_precision_the_modules_own_forward_runs(calls, dtype, autocast):
    model = random_vlm()[0].to(dtype)
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    expected, found = (output_and_gradients(each, autocast=autocast)[0] for each in (model, fused))
    assert torch.equal(expected, found) and not calls


def test_a_model_is_pickled_as_before():
    model, _ = random_vlm()
    fuse_norms(model)
    loaded = pickle.loads(pickle.dumps(model))
    expected, found = (output_and_gradients(each)[0] for each in (model, loaded))
    assert torch.allclose(expected, found, atol=1e-5)
