"""`r1v-rl plan`: sizes of the real model, FLOPs as torch counts them, and a plan that does not fit is refused."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_vlm import picture, random_vlm, save_random_vlm
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from r1v_rl import cli
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.models.logprobs import Scored, add_logprob_head
from r1v_rl.models.norms import fuse_norms
from r1v_rl.models.packing import PackedLayout, enable_packing
from r1v_rl.models.parts import PARTS, freeze_all_but, part_of
from r1v_rl.plan.needs import Setting, Work, flops_of, memory_of
from r1v_rl.plan.shape import Shape
from r1v_rl.plan.work import grpo_work, sft_work
from r1v_rl.sft.config import SFTConfig

ROOT = Path(__file__).parents[2]
IN_PLACE = {torch.ops.aten.addmm_: lambda to, a, b, **_: 2 * a[0] * a[1] * b[1]}
"""Of the products, torch's counter knows all but this one: shapes in, FLOPs out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def shape(folder):
    return Shape.of(AutoConfig.from_pretrained(folder))


def test_parameters_are_those_of_the_model(shape):
    model, _ = random_vlm()
    counted = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counted[part_of(name)] += parameter.numel()
    assert shape.parameters == counted


def test_flops_are_those_that_torch_counts(shape):
    """Forward of the language model and its head on text, and of the vision encoder, without their attention."""
    model, processor = random_vlm()
    model.set_attn_implementation("eager")
    tokens = 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(5, 60, (1, tokens)))
    expected = shape.trunk_flops(tokens, seen=tokens**2) + shape.head_flops(tokens)  # eager attends to all pairs
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # norms are parameters, not products
    inputs = processor.image_processor(images=[picture(0)], return_tensors="pt")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.vision_tower(pixel_values=inputs["pixel_values"])
    assert counter.get_total_flops() == pytest.approx(shape.vision_flops(4), rel=0.35)  # attention, class token


def test_the_heads_passes_are_those_that_torch_counts(shape):
    """Products of one forward and backward of the trunk with its head; a change of the head changes them alone."""
    scored = Scored(torch.tensor([3, 4, 9]), torch.tensor([50, 60, 70]), None)
    counted, planned = [], []
    language, projector = ("language_model",), ("projector",)
    for parts, only in ((language, False), (language, True), (projector, False), (projector, True)):
        model, _ = random_vlm()
        freeze_all_but(model, ["language_model"])
        model.lm_head.weight.requires_grad_(parts == language)
        add_logprob_head(model, temperature=1.0, float32_head=False, logprobs_only=only)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            scores = model(input_ids=torch.arange(40, 52)[None], scored=scored)
            (scores.logprobs.sum() if only else (scores.logprobs + scores.entropies).sum()).backward()
        counted.append(counter.get_total_flops())
        setting = Setting(parts, "float32", "float32", False, logprobs_only=only)
        planned.append(flops_of(shape, Work(tokens=12, scored=3, seen=72, visual=0), setting)["LM head"])
    assert [a - b for a, b in itertools.pairwise(counted)] == [a - b for a, b in itertools.pairwise(planned)]
    assert planned[-1] == 2 * shape.head_flops(3)


def test_memory_worked_by_hand():
    sizes = {"vision_encoder": 10, "projector": 20, "language_model": 70}
    shape = Shape(
        sizes, 0, layers=2, hidden=4, heads=2, queries=4, key_values=2, mlp=8, vocabulary=100, patches=4.0,
        vision_hidden=3,
    )  # fmt: skip
    work = Work(tokens=10, scored=5, seen=0, visual=0)
    plain = Setting(("projector",), "float32", "float32", checkpointing=False, accumulates=True, on_cpu=True)
    frozen = 2 * 4 * 4 + 4 * 2 + 4 * (2 * 4 + 2 * 2 + 3 * 8)
    activations, backward = (2 * frozen + 4 * 4 + 2 * 4 * 2) * 10, 5 * 100 * (4 + 7 * 4 + 1)
    assert memory_of(shape, work, plain) == {
        "weights": 400, "gradients": 80, "optimizer": 160, "activations": activations,
        "backward, largest step": backward, "between tensors": pytest.approx(0.35 * (activations + backward)),
    }  # fmt: skip
    assert memory_of(shape, work, replace(plain, accumulates=False))["gradients"] == 0
    sharded = Setting(("language_model",), "bfloat16", "bfloat16", True, True, zero_stage=2, num_processes=4)
    spread = memory_of(shape, work, replace(sharded, accumulates=True))
    assert (spread["weights"], spread["reference"], spread["gradients"], spread["optimizer"]) == (200, 200, 35, 70)
    trained = 2 * 4 * 4 + 4 * 2 + 2 * (2 * 4 + 2 * 2 + 3 * 8) + 2 * 2 * 4 + 2 * (2 * 4 + 8)
    assert spread["activations"] == (2 * 4 * 2 + trained + (4 + 2) * 4 + 2 * 4 * 2) * 10


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_activations_are_those_that_the_graph_keeps(shape, trainable, autocast):
    """Every tensor that is saved for the backward pass of a packed row, each storage once, weights left out."""
    model, _ = random_vlm()
    freeze_all_but(model, trainable)
    enable_packing(model)
    fuse_norms(model)
    tokens, saved = 600, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    layout = PackedLayout.of([tokens])
    ids = torch.randint(5, 60, (1, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        embedded = model.get_input_embeddings()(ids).requires_grad_()  # what the projector gives
        layers = model.model.language_model(inputs_embeds=embedded, use_cache=False, **layout.forward_kwargs("cpu"))
    assert layers.last_hidden_state.requires_grad
    setting = Setting(tuple(trainable), "float32", "bfloat16" if autocast else "float32", checkpointing=False)
    planned = memory_of(shape, Work(tokens, 0, 0, 0), setting)
    found = sum(size for size, _ in saved.values())
    assert planned["activations"] + planned.get("weights, autocast", 0.0) == pytest.approx(found, rel=0.1)


def test_a_frozen_language_model_costs_one_backward_pass_less(shape):
    work = Work(tokens=100, scored=10, seen=5000, visual=8)
    frozen, trained = (
        flops_of(shape, work, Setting(parts, "float32", "float32", False))
        for parts in (("projector",), ("projector", "language_model"))
    )
    assert frozen["language model, backward"] == frozen["language model, forward"]
    assert trained["language model, backward"] == 2 * trained["language model, forward"]


def test_a_shared_prompt_is_counted_once_a_group(tmp_path):
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True}
    shared, plain = (
        grpo_work(GRPOConfig(**settings, share_prefix=share, bf16=False), prompt=100, visual=64, completion=10)
        for share in (True, False)
    )
    assert (shared.tokens, plain.tokens) == (2 * 100 + 80, 8 * 110)
    assert shared.visual == plain.visual == 2 * 64
    assert shared.seen == 8 * 10 * 105 + 2 * 5000


@pytest.mark.parametrize(
    ("budget", "share", "passes"),
    [
        (None, True, [280]), (280, True, [280]), (140, True, [140, 140]), (125, True, [120] * 4),
        (250, True, [250, 130]), (100, True, [110] * 8), (330, False, [330, 330, 220]),
    ],
)  # fmt: skip
def test_a_prompt_is_counted_in_every_pass(tmp_path, budget, share, passes):
    """As `within_budget` cuts two groups of four: prompts of 100 tokens, completions of 10, and a row that is longer
    than the budget goes alone."""
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, use_cpu=True, bf16=False,
        share_prefix=share, max_tokens_per_forward=budget,
    )  # fmt: skip
    work = grpo_work(args, prompt=100, visual=64, completion=10)
    assert work.passes == len(passes)
    assert work.tokens * work.passes == pytest.approx(sum(passes))
    assert max(passes) <= work.tokens * work.fullest + 1e-9 and work.scored * work.passes == pytest.approx(80)


def test_packed_rows_are_full(tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path), packing=True, max_length=1000, per_device_train_batch_size=2, use_cpu=True, bf16=False
    )
    assert sft_work(args, sample=100, visual=64, target=20) == Work(2000, 400, 20 * 5000, 20 * 64)


def test_the_command(folder, capsys, monkeypatch):
    """What it prints for a recipe, and exit code 2 where a device is too small."""
    monkeypatch.chdir(ROOT)
    words = ["plan", "--config", "recipes/tiny/grpo.yaml", "--model_name_or_path", str(folder), "--dataset_size", "16"]
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    for name in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "backward, largest step",
        "vLLM",
        "language model, backward",
    ):
        assert f"  {name}" in output
    assert cli.main([*words, "--device_memory_gb", "0.0001"]) == 2
    assert "vLLM holds" in capsys.readouterr().err
    assert cli.main([*words, "--device_memory_gb", "0.01"]) == 2
    assert "GB on each device. Lower" in capsys.readouterr().err
    given = ["--prompt_tokens", "100", "--visual_tokens", "64"]
    assert cli.main([*words[:3], "--model_name_or_path", "nowhere", *given]) == 2
    assert "--model_config" in capsys.readouterr().err
    assert cli.main([*words[:3], "--model_name_or_path", "nowhere", "--model_config", str(folder), *given]) == 0
