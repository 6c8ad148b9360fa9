"""One recorded generation batch, run through TRL's trainer and through ours."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from random_families import random_family
from random_vlm import picture, random_vlm
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import split_tensor_dict

from r1v_rl.grpo.batch import loss_mask, score
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.models.parts import freeze_all_but
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.types import Completion

G = 4
LENGTHS = [3, 9, 6, 9, 1, 4, 2, 9, 5, 5, 5, 5, 8, 7, 2, 6]
SIZES = [[(32, 32)], [(64, 32), (32, 32)], [(32, 96)], [(40, 32)]]  # mixed tile counts: 1, 3+1, 4, 1
EVERYTHING = ["vision_encoder", "projector", "language_model"]
FAMILY_SIZES = [[(32, 32)], [(64, 32), (32, 32), (24, 64)], [(40, 24)], []]  # one, three and no pictures


@dataclass
class Outcome:
    """What both trainers are compared on."""

    loss: float
    logprobs: list[Tensor]
    entropies: list[Tensor]
    gradients: dict[str, Tensor]


class RecordedEngine:
    """Hands out the recorded completions."""

    def __init__(self, completions: dict[str, list[Completion]]):
        self._completions = completions

    def sync_weights(self, policy: nn.Module, version: int = 0) -> None:
        for completion in (c for group in self._completions.values() for c in group):
            completion.weight_version = version

    def generate(self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        return [self._completions[prompt.example.id] for prompt in prompts]

    def token_logprobs(self, prompts: list[EncodedPrompt], texts: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError


class Recording:
    """Four prompts of mixed tile counts, completions of mixed lengths, sampler log-probabilities near the policy's."""

    def __init__(self, folder: Path, *, share_prefix: bool = True, family: str | None = None) -> None:
        self.share_prefix = share_prefix
        model, self.processor = random_family(family) if family else random_vlm()
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder)  # TRL's reference reloads it
        generator = torch.Generator().manual_seed(7)
        self.rows = [
            {
                "id": f"row{i}",
                "prompt": [{"role": "user", "content": f"How many red {'circles' if i % 2 else 'squares'}?"}],
                "images": [picture(10 * i + j, *size) for j, size in enumerate(sizes)],
            }
            for i, sizes in enumerate(FAMILY_SIZES if family else SIZES)
        ]
        eos = self.processor.tokenizer.eos_token_id
        self.completion_ids = [
            [*torch.randint(40, 700, (n - 1,), generator=generator).tolist(), eos if n < 9 else 77] for n in LENGTHS
        ]
        self.noise = [0.3 * torch.randn(n, generator=generator) for n in LENGTHS]
        self.sampler_logprobs = [torch.full((n,), -6.0) + noise for n, noise in zip(LENGTHS, self.noise, strict=True)]

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Different within groups, equal in the third (all of length 5)."""
        return [float(len(ids) % 4) + 0.1 * (ids[0] % 3 if len(ids) != 5 else 0) for ids in completion_ids]


def settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    rows = len(LENGTHS)
    return {
        "output_dir": str(output_dir), "per_device_train_batch_size": rows, "num_generations": G,
        "max_completion_length": 9, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False,
        "report_to": [], "use_cpu": True, "vllm_importance_sampling_mode": "token_mask", **changes,
    }  # fmt: skip


def run_trl(recording: Recording, output_dir: Path, move: float, **changes: Any) -> Outcome:
    """TRL's own trainer on the recording; `move` shifts the weights between the rollout and the update."""
    model = copy.deepcopy(recording.model)
    corrected = changes.pop("corrected", False)
    freeze_all_but(model, changes.pop("trainable", EVERYTHING))
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=recording.reward,
        args=trl.GRPOConfig(**settings(output_dir, **changes)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "id": row["id"]} for row in recording.rows]),
        processing_class=recording.processor,
        rollout_func=lambda prompts, _: {
            "prompt_ids": _trl_prompt_ids(recording),
            "completion_ids": recording.completion_ids,
            "logprobs": [row.tolist() for row in recording.sampler_logprobs],
        },
    )
    if corrected:  # as if vLLM had sampled
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = steps = trainer.args.gradient_accumulation_steps
    batch = trainer._generate_and_score_completions([row for row in recording.rows for _ in range(G)])
    _move_weights(trainer.model, move)
    return _outcome(trainer, _trl_losses(trainer, batch, steps))


def run_ours(recording: Recording, output_dir: Path, move: float, **changes: Any) -> Outcome:
    """Our trainer on the same recording, moved likewise."""
    model = copy.deepcopy(recording.model)
    corrected = changes.pop("corrected", False)
    changes = {"trainable": EVERYTHING, "share_prefix": recording.share_prefix, **changes}
    completions = {}
    for p, row in enumerate(recording.rows):
        own = slice(p * G, (p + 1) * G)
        logprobs = recording.sampler_logprobs[own] if corrected else [torch.zeros(0)] * G
        completions[row["id"]] = [
            Completion(ids, row_logprobs.tolist(), "", is_truncated=len(ids) == 9)
            for ids, row_logprobs in zip(recording.completion_ids[own], logprobs, strict=True)
        ]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[recording.reward],
        args=GRPOConfig(**settings(output_dir, shuffle_dataset=False, save_rollouts=False, **changes)),
        train_dataset=recording.rows,
        processing_class=recording.processor,
        engine=RecordedEngine(completions),
    )
    assert trainer.share_prefix == recording.share_prefix
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = steps = trainer.args.gradient_accumulation_steps
    first = trainer._prepare_inputs({})
    _move_weights(trainer.model, move)
    return _outcome(trainer, _our_losses(trainer, first, steps))


def _trl_losses(trainer: Any, batch: dict, steps: int):
    for part in split_tensor_dict_with_images(batch, steps):
        yield trainer.compute_loss(trainer.model, part), *_trl_scores(trainer, part)


def _our_losses(trainer: GRPOTrainer, first: dict, steps: int):
    size = trainer.args.per_device_train_batch_size
    for step in range(steps):
        rows = {"start": first["start"] + step * size, "end": first["end"] + step * size}
        yield trainer.compute_loss(trainer.model, rows), *_our_scores(trainer, rows)


def split_tensor_dict_with_images(batch: dict, steps: int) -> list[dict]:
    """TRL's split, for images too where there is more than one part."""
    if steps == 1:
        return [batch]
    rows = len(batch["advantages"]) // steps
    tiles, images = batch["num_tiles"], batch["num_images"]
    scalars = {k: batch[k] for k in ("num_items_in_batch",)}
    tensors = {k: v for k, v in batch.items() if k not in (*scalars, "pixel_values", "num_tiles", "num_images")}
    parts = split_tensor_dict(tensors, steps)
    for i, part in enumerate(parts):
        own = slice(i * rows, (i + 1) * rows)
        start = sum(tiles[: own.start])
        part |= scalars | {"num_tiles": tiles[own], "num_images": images[own]}
        part["pixel_values"] = batch["pixel_values"][start : start + sum(tiles[own])]
    return parts


def _outcome(trainer: Any, losses: Any) -> Outcome:
    total, logprobs, entropies = 0.0, [], []
    for loss, part_logprobs, part_entropies in losses:
        loss.backward()
        total += loss.item()
        logprobs += part_logprobs
        entropies += part_entropies
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return Outcome(total, logprobs, entropies, gradients)


@torch.no_grad()
def _trl_scores(trainer: Any, part: dict) -> tuple[list[Tensor], list[Tensor]]:
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
    mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
    names = ("pixel_values", "num_images", "num_tiles", "image_grid_thw", "image_sizes", "mm_token_type_ids")
    vision = {name: part[name] for name in names if name in part}
    logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, part["completion_ids"].size(1), compute_entropy=True, **vision
    )
    kept = part["completion_mask"].bool()
    return [r[m] for r, m in zip(logprobs, kept, strict=True)], [r[m] for r, m in zip(entropies, kept, strict=True)]


@torch.no_grad()
def _our_scores(trainer: GRPOTrainer, rows: dict) -> tuple[list[Tensor], list[Tensor]]:
    inputs = trainer._model_inputs(trainer._buffer, range(rows["start"], rows["end"]))
    logprobs, entropies = score(trainer.model, inputs)
    kept = loss_mask(trainer._buffer, range(rows["start"], rows["end"]))
    return [r[m] for r, m in zip(logprobs, kept, strict=True)], [r[m] for r, m in zip(entropies, kept, strict=True)]


@torch.no_grad()
def _move_weights(model: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def _trl_prompt_ids(recording: Recording) -> list[list[int]]:
    from r1v_rl.data.dataset import examples_from_rows

    examples = examples_from_rows(recording.rows, images_without_marks="prepend", answer_required=False)
    return [encode_prompt(recording.processor, e, device="cpu").prompt_ids for e in examples for _ in range(G)]
