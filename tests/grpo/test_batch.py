"""Rows without, with one and with three pictures in one batch; pixels once; what is frozen builds no graph."""

import pytest
import torch
from random_vlm import picture, random_vlm

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.grpo.batch import GenerationBatch, model_inputs, score
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.loss import LossInputs, Normalisation, policy_loss
from r1v_rl.models.logprobs import add_logprob_head
from r1v_rl.models.parts import freeze_all_but, part_module, part_of
from r1v_rl.rollout.prompts import encode_prompt

G = 3
LENGTHS = [4, 7, 1, 5, 2, 6, 3, 3, 8]


@pytest.fixture()
def policy():
    model, processor = random_vlm()
    freeze_all_but(model, ["projector", "language_model"])
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


def loss_of(model, batch: GenerationBatch, start: int, end: int, args: GRPOConfig) -> torch.Tensor:
    inputs = model_inputs(batch, start, end, pad_token_id=0, device="cpu")
    logprobs, entropies = score(model, inputs)
    loss_inputs = LossInputs(logprobs, entropies, batch.advantages[start:end], inputs.loss_mask)
    return policy_loss(loss_inputs, args, Normalisation(1, torch.tensor(batch.process_tokens)))[0]


def test_a_mixed_batch_gives_the_loss_of_its_rows_one_by_one(policy, tmp_path):
    model, processor = policy
    batch = mixed_batch(processor)
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, bf16=False)
    together = loss_of(model, batch, 0, len(LENGTHS), args)
    together.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    one_by_one = 0.0
    for row in range(len(LENGTHS)):
        loss = loss_of(model, batch, row, row + 1, args)
        loss.backward()
        one_by_one += loss.item()
    assert together.item() == pytest.approx(one_by_one, rel=1e-6, abs=1e-7)
    for name, gradient in gradients.items():
        error = (gradient - model.get_parameter(name).grad).norm() / gradient.norm()
        assert error < 1e-5, name


def test_every_picture_goes_through_the_tower_once(policy):
    """1 + 5 tiles whatever G is, and no copies of pixels in the batch."""
    model, processor = policy
    tiles = []
    part_module(model, "vision_encoder").register_forward_pre_hook(
        lambda module, args, kwargs: tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    batch = mixed_batch(processor)
    inputs = model_inputs(batch, 0, len(LENGTHS), pad_token_id=0, device="cpu")
    assert len(inputs.kwargs["pixel_values"]) == sum(len(p.vision_inputs["pixel_values"]) for p in batch.prompts[1:])
    score(model, inputs)
    assert tiles == [len(inputs.kwargs["pixel_values"])]


def test_a_frozen_tower_builds_no_graph_even_under_gradient_checkpointing(policy):
    model, processor = policy
    model.gradient_checkpointing_enable()
    outputs = []
    part_module(model, "vision_encoder").register_forward_hook(lambda m, a, out: outputs.append(out.last_hidden_state))
    inputs = model_inputs(mixed_batch(processor), 0, len(LENGTHS), pad_token_id=0, device="cpu")
    score(model, inputs)[0].sum().backward()
    assert [out.requires_grad for out in outputs] == [False], "one forward, no graph, no recomputation"
    with_gradient = {part_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"projector", "language_model"}


def test_a_trainable_tower_gets_gradients(policy):
    model, processor = policy
    freeze_all_but(model, ["vision_encoder"])
    inputs = model_inputs(mixed_batch(processor), 0, len(LENGTHS), pad_token_id=0, device="cpu")
    score(model, inputs)[0].sum().backward()
    assert {part_of(n) for n, p in model.named_parameters() if p.grad is not None} == {"vision_encoder"}
