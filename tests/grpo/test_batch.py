"""Rows without, with one and with three pictures in one batch; pixels once; what is frozen builds no graph."""

import pytest
import torch
from random_vlm import picture, random_vlm

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.grpo.batch import GenerationBatch, loss_mask, model_inputs, padded, score
from r1v_rl.grpo.config import LOSS_TYPES, GRPOConfig
from r1v_rl.grpo.loss import LossInputs, Normalisation, policy_loss
from r1v_rl.models.logprobs import add_logprob_head
from r1v_rl.models.packing import enable_packing
from r1v_rl.models.parts import freeze_all_but, part_module, part_of
from r1v_rl.rollout.prompts import encode_prompt

G = 3
LENGTHS = [4, 7, 1, 5, 2, 6, 3, 3, 8]
ROWS = range(len(LENGTHS))


@pytest.fixture(params=[True, False], ids=["shared", "padded"])
def share_prefix(request) -> bool:
    return request.param


@pytest.fixture()
def policy():
    model, processor = random_vlm()
    freeze_all_but(model, ["projector", "language_model"])
    enable_packing(model)
    add_logprob_head(model, temperature=1.0, float32_head=False)
    return model.train(), processor


def mixed_batch(processor) -> GenerationBatch:
    pictures = [[], [picture(1)], [picture(2), picture(3, 64, 32), picture(4, 32, 96)]]
    rows = [
        {"id": str(i), "prompt": [{"role": "user", "content": "How many red circles?"}], "images": images}
        for i, images in enumerate(pictures)
    ]
    examples = examples_from_rows(rows, images_without_marks="prepend", answer_required=False)
    generator = torch.Generator().manual_seed(1)
    return GenerationBatch(
        prompts=[encode_prompt(processor, example, device="cpu") for example in examples],
        completion_ids=[torch.randint(40, 700, (n,), generator=generator).tolist() for n in LENGTHS],
        counts=[True] * len(LENGTHS),
        advantages=torch.randn(len(LENGTHS), generator=generator),
        process_tokens=float(sum(LENGTHS)),
        weight_version=0,
    )


def loss_of(model, batch: GenerationBatch, rows: range, args: GRPOConfig, *, share_prefix: bool) -> torch.Tensor:
    inputs = model_inputs(batch, rows, pad_token_id=0, device="cpu", share_prefix=share_prefix)
    logprobs, entropies = score(model, inputs)
    reference = padded(batch.reference_logprobs, rows, logprobs)
    advantages = batch.advantages[rows.start : rows.stop]
    loss_inputs = LossInputs(logprobs, entropies, advantages, loss_mask(batch, rows), reference_logprobs=reference)
    return policy_loss(loss_inputs, args, Normalisation(1, torch.tensor(batch.process_tokens)))[0]


def test_a_mixed_batch_gives_the_loss_of_its_rows_one_by_one(policy, tmp_path, share_prefix):
    model, processor = policy
    batch = mixed_batch(processor)
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, bf16=False)
    together = loss_of(model, batch, ROWS, args, share_prefix=share_prefix)
    together.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    one_by_one = 0.0
    for row in range(len(LENGTHS)):
        loss = loss_of(model, batch, range(row, row + 1), args, share_prefix=share_prefix)
        loss.backward()
        one_by_one += loss.item()
    assert together.item() == pytest.approx(one_by_one, rel=1e-6, abs=1e-7)
    for name, gradient in gradients.items():
        error = (gradient - model.get_parameter(name).grad).norm() / gradient.norm()
        assert error < 1e-5, name


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sharing_the_prompt_changes_no_number(policy, tmp_path, loss_type, beta):
    """Text, one and three pictures in one row; the second group of equal rewards, a completion that does not count."""
    model, processor = policy
    batch = mixed_batch(processor)
    batch.advantages[G : 2 * G] = 0.0
    batch.counts[1] = False
    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, bf16=False, beta=beta,
        loss_type=loss_type, entropy_coef=0.01,
    )  # fmt: skip
    if beta:
        batch.reference_logprobs = [torch.full((n,), -6.0) for n in LENGTHS]
    shared = loss_of(model, batch, ROWS, args, share_prefix=True)
    padded_rows = loss_of(model, batch, ROWS, args, share_prefix=False)
    assert shared.item() == pytest.approx(padded_rows.item(), rel=1e-6)
    expected = gradients(model, padded_rows)
    found = gradients(model, shared)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_prompt_is_run_once(policy):
    """Three prompts and their completions without the last tokens, against every prompt three times and padding."""
    batch = mixed_batch(policy[1])
    tokens = {}
    for share_prefix in (True, False):
        inputs = model_inputs(batch, ROWS, pad_token_id=0, device="cpu", share_prefix=share_prefix)
        tokens[share_prefix] = inputs.kwargs["input_ids"].numel()
    prompts = [len(p.prompt_ids) for p in batch.prompts]
    assert tokens[True] == sum(prompts) + sum(LENGTHS) - len(LENGTHS)
    assert tokens[False] == len(LENGTHS) * max(p + n for p, n in zip(prompts, (7, 6, 8), strict=True))


def test_every_picture_goes_through_the_tower_once(policy, share_prefix):
    """1 + 5 tiles whatever G is, and no copies of pixels in the batch."""
    model, processor = policy
    tiles = []
    part_module(model, "vision_encoder").register_forward_pre_hook(
        lambda module, args, kwargs: tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    batch = mixed_batch(processor)
    inputs = model_inputs(batch, ROWS, pad_token_id=0, device="cpu", share_prefix=share_prefix)
    assert len(inputs.kwargs["pixel_values"]) == sum(len(p.vision_inputs["pixel_values"]) for p in batch.prompts[1:])
    score(model, inputs)
    assert tiles == [len(inputs.kwargs["pixel_values"])]


def test_a_frozen_tower_builds_no_graph_even_under_gradient_checkpointing(policy, share_prefix):
    model, processor = policy
    model.gradient_checkpointing_enable()
    outputs = []
    part_module(model, "vision_encoder").register_forward_hook(lambda m, a, out: outputs.append(out.last_hidden_state))
    inputs = model_inputs(mixed_batch(processor), ROWS, pad_token_id=0, device="cpu", share_prefix=share_prefix)
    score(model, inputs)[0].sum().backward()
    assert [out.requires_grad for out in outputs] == [False], "one forward, no graph, no recomputation"
    with_gradient = {part_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"projector", "language_model"}


def test_a_trainable_tower_gets_gradients(policy, share_prefix):
    model, processor = policy
    freeze_all_but(model, ["vision_encoder"])
    inputs = model_inputs(mixed_batch(processor), ROWS, pad_token_id=0, device="cpu", share_prefix=share_prefix)
    score(model, inputs)[0].sum().backward()
    assert {part_of(n) for n, p in model.named_parameters() if p.grad is not None} == {"vision_encoder"}
