"""LLaVA, LLaVA-NeXT, Qwen2.5-VL and Qwen3-VL: packed and padded samples against the model's own forward."""

import copy
import itertools

import pytest
import torch
from random_families import FAMILIES, random_family
from random_vlm import picture
from sft.tiny_sft import ROWS, make_trainer
from torch import Tensor

from r1v_rl.sft.collation import Collator

SAMPLES = [0, 2, 1, 3, 4, 5]
"""One picture, two, none, a wide one, none, and the first sample's picture again."""


@pytest.fixture(params=FAMILIES)
def case(request, tmp_path):
    """(trainer, an untouched twin of its model)"""
    model, processor = random_family(request.param)
    picture(0).save(tmp_path / "shared.png")
    rows = [dict(row) for row in ROWS]
    rows[0]["images"] = rows[5]["images"] = [str(tmp_path / "shared.png")]
    twin = copy.deepcopy(model)
    return make_trainer(model, tmp_path, rows=rows, processor=processor, max_length=400), twin


def losses(trainer, *, flat: bool) -> Tensor:
    """Of every target token."""
    batch = Collator(trainer._train_rows, flat=flat, pad_token_id=0)([[sample] for sample in SAMPLES])
    assert batch["image_rows"] is not None, "a picture that two samples share is read once"
    return -trainer.compute_loss(trainer.model, batch, return_outputs=True)[1].logprobs


def own_losses(trainer, twin) -> Tensor:
    """By the twin's own forward on what its processor gives, one sample at a time."""
    found, rows = [], trainer._train_rows
    for sample in SAMPLES:
        ids, num_prompt = rows.ids(sample)
        pictures = [picture(0) if sample in (0, 5) else image for image in ROWS[sample]["images"]]
        text = trainer.processing_class.tokenizer.decode(rows.prompts[sample])
        inputs = dict(
            trainer.processing_class(
                text=[text], images=pictures or None, add_special_tokens=False, return_tensors="pt"
            )
        )
        assert inputs.pop("attention_mask").shape[1] == num_prompt
        inputs["input_ids"] = torch.tensor([ids])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(
                inputs["mm_token_type_ids"], (0, len(ids) - num_prompt)
            )
        logprobs = twin(**inputs).logits[0, num_prompt - 1 : -1].log_softmax(-1)
        found.append(-logprobs[range(len(ids) - num_prompt), ids[num_prompt:]])
    return torch.cat(found)


def gradients(model, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_and_padded_samples_equal_the_models_own_forward(case):
    trainer, twin = case
    for (name, parameter), own in zip(twin.named_parameters(), trainer.model.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad), name
    expected = own_losses(trainer, twin)
    wanted = gradients(twin, expected.mean())
    for flat in (True, False):
        found = losses(trainer, flat=flat)
        assert (found - expected).abs().max() <= 5e-6
        assert found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)
        got = gradients(trainer.model, found.mean())
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (flat, name)


def test_planted_errors_would_be_seen(case, monkeypatch):
    """Positions of another sample where pictures are counted by height and width; else a swapped picture."""
    import r1v_rl.sft.trainer as module

    trainer, twin = case
    expected = own_losses(trainer, twin)
    if hasattr(twin.base_model, "get_rope_index"):
        monkeypatch.setattr(module, "token_positions", lambda *args: None)
    else:
        rows = trainer._train_rows
        original = rows.vision_inputs
        monkeypatch.setattr(rows, "vision_inputs", lambda images: original([*images[1:], images[0]]))
    for flat in (True, False):
        try:
            found = losses(trainer, flat=flat)
        except ValueError:  # another picture, another number of tokens
            continue
        assert (found - expected).abs().max() > 1e-4


def test_a_run_packs(case):
    trainer, _ = case
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.args.max_steps, trainer.args.save_strategy = 2, "no"
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    frozen = [not parameter.requires_grad for parameter in trainer.model.parameters()]
    assert any(moved) and not any(itertools.compress(moved, frozen))
