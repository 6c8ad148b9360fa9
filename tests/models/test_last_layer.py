"""The last layer's products see the rows that are scored, and nothing else changes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_vlm import random_vlm
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from r1v_rl.models import last_layer, logprobs
from r1v_rl.models.logprobs import Scored, add_logprob_head
from r1v_rl.models.packing import PackedLayout, enable_packing

LAYOUT = PackedLayout.of([9, 4, 3, 5], prefixes=[None, 0, 0, None])
SCORED = Scored(torch.tensor([8, 9, 10, 8, 13, 14, 18, 19]), torch.tensor([50, 60, 70, 80, 90, 51, 61, 71]), None)
"""Two completions of one prompt, and a sample of its own: positions 0-7, 11, 12, 15-17 and 20 are read by nobody."""


def forward(*, skipping: bool, family=Qwen2Config, checkpointing: bool = False, lora: bool = False):
    """Scores, gradients by name, and how many rows the last layer's products and those of the one before it saw."""
    model, _ = random_vlm(text_config_class=family)
    enable_packing(model)
    with pytest.MonkeyPatch.context() as patch:
        if not skipping:
            patch.setattr(logprobs, "skip_unread_rows", lambda model: None)
        add_logprob_head(model, temperature=1.0, float32_head=False)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen: dict[int, list[int]] = {}
    layers = next(m for n, m in model.named_modules() if n.endswith("language_model")).layers
    for depth in (-2, -1):
        for product in (layers[depth].self_attn.o_proj, layers[depth].mlp.up_proj):
            product.register_forward_hook(lambda _, args, out, d=depth: seen.setdefault(d, []).append(args[0].shape[1]))
    ids = torch.randint(40, 700, (1, LAYOUT.num_tokens), generator=torch.Generator().manual_seed(0))
    scores = model.train()(input_ids=ids, scored=SCORED, **LAYOUT.forward_kwargs())
    (scores.logprobs * torch.linspace(-1, 2, 8) + scores.entropies).sum().backward()
    return scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize(("checkpointing", "lora"), [(False, False), (True, False), (False, True)])
def test_the_rows_that_are_read_are_as_before(family, checkpointing, lora):
    settings = {"family": family, "checkpointing": checkpointing, "lora": lora}
    expected, gradients, _ = forward(skipping=False, **settings)
    scores, found, seen = forward(skipping=True, **settings)
    times = 4 if checkpointing else 2
    assert seen == {-2: [LAYOUT.num_tokens] * times, -1: [7] * times}
    assert (scores.logprobs - expected.logprobs).abs().max() < 5e-6
    assert (scores.entropies - expected.entropies).abs().max() < 5e-6
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_a_prompt_is_its_last_query_and_keys_to_all():
    """A sample of its own begins where it is first scored, and one that is never scored has no queries at all."""
    layout = PackedLayout.of([9, 4, 3, 5, 2], prefixes=[None, 0, 0, None, None])
    last, first, second, own = slice(8, 9), slice(9, 13), slice(13, 16), slice(18, 21)
    assert layout.reading(SCORED.positions.unique()).blocks() == [
        *((queries, queries, True) for queries in (last, first, second, own)),
        (last, slice(0, 8), False),
        (own, slice(16, 18), False),
        (slice(9, 16), slice(0, 9), False),
    ]


def test_a_row_that_is_left_out_would_be_seen(monkeypatch):
    expected, *_ = forward(skipping=False)
    note = last_layer._Rows.note
    monkeypatch.setattr(
        last_layer._Rows, "note", lambda self, layer, args, kwargs: note(self, layer, args, _without_first(kwargs))
    )
    scores, *_ = forward(skipping=True)
    assert (scores.logprobs - expected.logprobs).abs().max() > 1e-4


def _without_first(kwargs: dict) -> dict:
    return {**kwargs, last_layer.READ: kwargs[last_layer.READ][1:]}


def test_a_plain_forward_runs_every_row():
    model, _ = random_vlm()
    add_logprob_head(model, temperature=1.0, float32_head=False)
    seen = []
    mlp = model.get_decoder().layers[-1].mlp
    mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[:2])))
    ids = torch.randint(40, 700, (2, 12))
    model(input_ids=ids, scored=Scored(torch.tensor([3]), torch.tensor([50]), None))
    model(input_ids=ids)
    assert seen == [(2, 12), (2, 12)]
