"""LLaVA, LLaVA-NeXT, Qwen2.5-VL and Qwen3-VL: shared and padded rows against the model's own forward, row by row."""

import copy

import pytest
import torch
from grpo.tiny_run import ROWS as RUN_ROWS
from grpo.tiny_run import make_trainer
from peft import LoraConfig, get_peft_model
from random_families import FAMILIES, random_family, save_random_family
from random_vlm import picture
from torch import Tensor
from transformers import Gemma2Config, MistralConfig, PhiConfig

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.grpo import batch as batches
from r1v_rl.grpo import policy
from r1v_rl.grpo.batch import GenerationBatch, loss_mask, model_inputs, score
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.loss import LossInputs, Normalisation, policy_loss
from r1v_rl.models import packing
from r1v_rl.models.attention_parts import CpuFlash
from r1v_rl.models.families import token_positions
from r1v_rl.models.logprobs import add_logprob_head
from r1v_rl.models.packing import PackedLayout, enable_packing
from r1v_rl.models.parts import PARTS, encoder_modules, freeze_all_but, part_of
from r1v_rl.models.vision_features import VisionFeatures
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt, placeholder_ids
from r1v_rl.training.launch import load_model

G = 3
LENGTHS = [4, 7, 1, 5, 2, 6, 3, 3, 8]
ROWS = range(len(LENGTHS))
PICTURES = [[(40, 24)], [], [(32, 32), (64, 32), (24, 64)]]
"""Of each prompt: one picture, text only, three of unlike sizes."""
three_axes = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
every_family = pytest.mark.parametrize("family", FAMILIES)


class Case:
    """A policy as the trainer prepares it, an untouched twin, and one batch of three groups."""

    def __init__(self, family: str, trainable: tuple[str, ...] = PARTS):
        self.twin, self.processor = random_family(family)
        freeze_all_but(self.twin, list(trainable))
        self.policy = copy.deepcopy(self.twin).train()
        enable_packing(self.policy)
        add_logprob_head(self.policy, temperature=1.0, float32_head=False)
        rows = [
            {"id": str(i), "prompt": [{"role": "user", "content": "How many red circles?"}],
             "images": [picture(10 * i + j, *size) for j, size in enumerate(sizes)]}
            for i, sizes in enumerate(PICTURES)
        ]  # fmt: skip
        examples = examples_from_rows(rows, images_without_marks="prepend", answer_required=False)
        generator = torch.Generator().manual_seed(1)
        advantages = torch.randn(len(LENGTHS), generator=generator)
        advantages[G : 2 * G] = 0.0  # a group of equal rewards
        self.batch = GenerationBatch(
            prompts=[encode_prompt(self.processor, example, device="cpu") for example in examples],
            completion_ids=[torch.randint(40, 700, (n,), generator=generator).tolist() for n in LENGTHS],
            counts=[True] * len(LENGTHS),
            advantages=advantages,
            process_tokens=float(sum(LENGTHS)),
            weight_version=0,
        )
        for prompt in self.batch.prompts:
            own = token_positions(self.policy, [prompt.prompt_ids], prompt.vision_inputs.get("image_grid_thw"))
            prompt.positions = own[0] if own else None

    def ours(self, *, share_prefix: bool) -> tuple[Tensor, Tensor]:
        inputs = model_inputs(self.batch, ROWS, pad_token_id=0, device="cpu", share_prefix=share_prefix)
        return score(self.policy, inputs)

    def native(self, prompt: EncodedPrompt) -> dict[str, Tensor]:
        """A prompt as the model's own processor gives it."""
        settings = {"add_special_tokens": False, "return_tensors": "pt"}
        return dict(self.processor(text=[prompt.text], images=prompt.images or None, **settings))

    def own(self) -> tuple[Tensor, Tensor]:
        """By the twin's own forward on what its processor gives, one row at a time."""
        mask = batches.token_mask(self.batch, ROWS)
        logprobs, entropies = torch.zeros(mask.shape), torch.zeros(mask.shape)
        for row in ROWS:
            prompt, ids = self.batch.prompts[row // G], torch.tensor(self.batch.completion_ids[row])
            inputs = self.native(prompt)
            start = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
            for name in ("attention_mask", "mm_token_type_ids"):
                if name in inputs:
                    fill = torch.full((1, len(ids)), int(name == "attention_mask"))
                    inputs[name] = torch.cat([inputs[name], fill], 1)
            every = self.twin(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
            logprobs[row, : len(ids)] = every[range(len(ids)), ids]
            entropies[row, : len(ids)] = -(every.exp() * every).sum(-1)
        return logprobs, entropies

    def loss(self, logprobs: Tensor, entropies: Tensor, folder) -> Tensor:
        args = GRPOConfig(
            output_dir=str(folder), num_generations=2, per_device_train_batch_size=2, bf16=False, use_cpu=True
        )
        inputs = LossInputs(logprobs, entropies, self.batch.advantages, loss_mask(self.batch, ROWS))
        return policy_loss(inputs, args, Normalisation(1, torch.tensor(self.batch.process_tokens)))[0]


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(case: Case, folder, *, share_prefix: bool) -> None:
    logprobs, entropies = case.ours(share_prefix=share_prefix)
    own_logprobs, own_entropies = case.own()
    assert (logprobs - own_logprobs).abs().max() <= 5e-6
    assert (entropies - own_entropies).abs().max() <= 1e-5
    loss, own_loss = case.loss(logprobs, entropies, folder), case.loss(own_logprobs, own_entropies, folder)
    assert loss.item() == pytest.approx(own_loss.item(), rel=1e-6, abs=1e-7)
    found, expected = gradients(case.policy, loss), gradients(case.twin, own_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@every_family
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "padded"])
def test_rows_equal_the_models_own_forward(family, share_prefix, tmp_path):
    """Log-probabilities, entropies, loss and the gradients of all parts, the tower and the mergers too."""
    assert_equal(Case(family), tmp_path, share_prefix=share_prefix)


@every_family
def test_gradient_checkpointing_changes_no_number(family, tmp_path):
    case = Case(family, ("projector", "language_model"))
    case.policy.gradient_checkpointing_enable({"use_reentrant": True})
    case.policy.enable_input_require_grads()
    assert_equal(case, tmp_path, share_prefix=True)


# ---- planted errors -----------------------------------------------------------------------------------------------


@every_family
def test_a_position_off_by_one_would_be_seen(family, tmp_path, monkeypatch):
    """Completions start one place too late."""
    original = PackedLayout.position_ids

    def late(layout, *args, **kwargs):
        positions = original(layout, *args, **kwargs).clone()
        for segment in layout.segments:
            if segment.prefix is not None:
                positions[..., segment.start : segment.end] += 1
        return positions

    monkeypatch.setattr(PackedLayout, "position_ids", late)
    with pytest.raises(AssertionError):
        assert_equal(Case(family), tmp_path, share_prefix=True)


@three_axes
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "padded"])
def test_positions_of_plain_text_would_be_seen(family, share_prefix, tmp_path):
    """0, 1, 2, ... for a model that counts pictures by height and width."""
    case = Case(family)
    for prompt in case.batch.prompts:
        prompt.positions = None if prompt.positions is None else torch.arange(len(prompt.prompt_ids)).expand(3, -1)
    with pytest.raises(AssertionError):
        assert_equal(case, tmp_path, share_prefix=share_prefix)


@every_family
def test_a_leaking_mask_would_be_seen(family, tmp_path, monkeypatch):
    """The last completion of a group sees its sibling too."""
    original = PackedLayout.blocks

    def leaking(layout):
        first, second = [s for s in layout.segments if s.prefix == 0][:2]
        return [*original(layout), (slice(second.start, second.end), slice(first.start, first.end), False)]

    monkeypatch.setattr(PackedLayout, "blocks", leaking)
    with pytest.raises(AssertionError):
        assert_equal(Case(family), tmp_path, share_prefix=True)


@every_family
def test_a_detached_prefix_would_be_seen(family, tmp_path, monkeypatch):
    """The prompt's keys and values get no gradient from the completions."""

    class Detached(CpuFlash):
        def backward(self, *args, causal, scale):
            q, k, v = super().backward(*args, causal=causal, scale=scale)
            return (q, k, v) if causal else (q, torch.zeros_like(k), torch.zeros_like(v))

    monkeypatch.setattr(packing, "kernel_for", lambda q: Detached())
    with pytest.raises(AssertionError):
        assert_equal(Case(family), tmp_path, share_prefix=True)


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "padded"])
def test_deep_stack_features_of_another_picture_would_be_seen(share_prefix, tmp_path):
    case = Case("qwen3_vl")
    backbone = case.policy.base_model
    original = backbone.get_image_features

    def swapped(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.deepstack_features = [layer.flip(0) for layer in outputs.deepstack_features]
        return outputs

    backbone.get_image_features = swapped
    with pytest.raises(AssertionError):
        assert_equal(case, tmp_path, share_prefix=share_prefix)


# ---- pictures -----------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "padded"])
def test_every_picture_is_seen_once_without_a_graph(family, share_prefix):
    """Under gradient checkpointing, whose hook would give the frozen tower a graph."""
    case = Case(family, ("projector", "language_model"))
    case.policy.gradient_checkpointing_enable({"use_reentrant": False})
    case.policy.enable_input_require_grads()
    blocks = [m for m in encoder_modules(case.policy)[-1].modules() if type(m).__name__.endswith(("Layer", "Block"))]
    seen: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    logprobs, _ = case.ours(share_prefix=share_prefix)
    logprobs.sum().backward()
    assert len(seen) == 1 and not seen[0].requires_grad and not blocks[-1].training
    assert len(seen[0]) == sum(map(unique_pieces, case.batch.prompts))
    for name, parameter in case.policy.named_parameters():
        assert part_of(name) != "vision_encoder" or parameter.grad is None, name


def unique_pieces(prompt: EncodedPrompt) -> int:
    """Patches (Qwen) or tiles of a prompt's pictures, the empty ones that fill LLaVA-NeXT's up not counted."""
    pixels = prompt.vision_inputs.get("pixel_values", torch.zeros(0, 1))
    pixels = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    return int((pixels.flatten(1) != 0).any(1).sum())


def test_kept_features_of_llava_give_the_same_numbers():
    case = Case("llava", ("projector", "language_model"))
    expected, _ = case.ours(share_prefix=True)
    features = VisionFeatures(case.policy, cache_bytes=1 << 20)
    for _ in range(2):
        for prompt in case.batch.prompts:
            if prompt.images:
                pixels = encode_prompt(case.processor, prompt.example, device="cpu").vision_inputs["pixel_values"]
                prompt.vision_inputs["pixel_values"] = features.of(pixels, prompt.images)
    assert features.tower_tiles == 4  # the second time from the cache
    found, _ = case.ours(share_prefix=True)
    assert (found - expected).abs().max() <= 5e-6


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_5_vl", "its projector lies inside of its vision encoder"),
        ("qwen3_vl", "its projector lies inside of its vision encoder"),
        ("llava_next", "its pictures differ in their number of tiles"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_with_the_reason(family, reason, tmp_path):
    model = save_random_family(tmp_path / "model", family)
    with pytest.raises(RecipeError, match=reason):
        make_trainer(model, tmp_path, vision_features="cache")


@every_family
@pytest.mark.parametrize("adapter", [False, True], ids=["", "lora"])
def test_generate_reads_a_mixed_batch_as_the_model_reads_each_prompt(family, adapter):
    """The most likely tokens, against `generate` on what the processor gives, one prompt at a time."""
    case = Case(family)
    model, tokenizer, banned = case.twin.eval(), case.processor.tokenizer, placeholder_ids(case.twin.config)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    engine = TransformersEngine(model.eval(), tokenizer, eos_token_ids=[0], banned_token_ids=banned)
    found = engine.generate(case.batch.prompts, Sampling(1, max_tokens=6, temperature=0.0), seed=0)
    for prompt, (completion,) in zip(case.batch.prompts, found, strict=True):
        inputs = case.native(prompt)
        own = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=[0], suppress_tokens=banned, pad_token_id=0
        )
        assert completion.token_ids == own[0, inputs["input_ids"].shape[1] :].tolist()


# ---- whole runs ---------------------------------------------------------------------------------------------------


@every_family
def test_a_run_is_the_same_with_and_without_a_shared_prefix(family, tmp_path):
    """Three steps, rollouts by `generate`."""
    model = save_random_family(tmp_path / "model", family)
    runs = []
    for share_prefix in (True, False):
        folder = tmp_path / str(share_prefix)
        trainer = make_trainer(model, folder, rows=RUN_ROWS, share_prefix=share_prefix, max_steps=3, save_strategy="no")
        assert trainer.share_prefix is share_prefix
        trainer.train()
        keys = ("loss", "grad_norm", "entropy", "reward")
        runs.append([{k: row[k] for k in keys} for row in trainer.state.log_history if "loss" in row])
    assert len(runs[0]) == 3
    for shared, padded in zip(*runs, strict=True):
        assert shared == pytest.approx(padded, rel=1e-4, abs=1e-6)


def test_a_run_with_lora(tmp_path):
    """`generate` and the update find the positions behind the adapter."""
    model = save_random_family(tmp_path / "model", "qwen3_vl")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(model, tmp_path, adapter, trainable=None, max_steps=1, save_strategy="no")
    assert trainer.share_prefix
    trainer.train()
    assert any(prompt.positions is not None for prompt in trainer._buffer.prompts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"text_class": MistralConfig, "sliding_window": 16}, "some of its layers see a sliding window only"),
        ({"text_class": Gemma2Config, "head_dim": 32}, "sliding window"),
        ({"text_class": PhiConfig}, "its language model is a `phi`"),
    ],
)
def test_a_model_that_cannot_share_runs_padded_rows_and_says_why(text, reason, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(policy.logger, "warning", said.append)
    model = save_random_family(tmp_path / "model", "llava", **text)
    trainer = make_trainer(model, tmp_path, max_steps=1, save_strategy="no", disable_dropout=True)
    assert not trainer.share_prefix
    assert len(said) == 1 and "share_prefix" in said[0] and reason in said[0]
    trainer.train()
    assert trainer.state.global_step == 1


@every_family
def test_bfloat16_is_as_near_to_float32_as_the_models_own_forward(family, tmp_path):
    """The error of the whole gradient, against the own forward's."""
    case = Case(family)
    exact = flat(gradients(case.twin, case.loss(*case.own(), tmp_path)))
    case.twin.bfloat16()
    case.policy.bfloat16()
    theirs = flat(gradients(case.twin, case.loss(*case.own(), tmp_path)))
    ours = flat(gradients(case.policy, case.loss(*case.ours(share_prefix=True), tmp_path)))
    errors = [((found - exact).norm() / exact.norm()).item() for found in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1], errors


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].float().flatten() for name in sorted(found)])


def test_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(UserError, match="is a `paligemma` model; the trainers know internvl, llava, llava_next, qwen2"):
        load_model(str(tmp_path))
