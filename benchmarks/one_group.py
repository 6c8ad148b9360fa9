"""What `update.py` and `update_curves.py` time: one recorded group, run by TRL's trainer and ours; its cost model."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.models.compose import image_processor
from r1v_rl.models.logprobs import may_keep
from r1v_rl.models.parts import freeze_all_but, part_module
from r1v_rl.tiny.tokenizer import build_tokenizer
from r1v_rl.types import Completion

TILE, PATCH = 448, 14
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PICTURES = {1: (448, 448, 1), 5: (896, 896, 4), 13: (1792, 1344, 12)}
"""Tiles, thumbnail included: width, height, and the most tiles that the processor may cut."""


@dataclass(frozen=True)
class Shape:
    """Layers, width, heads and MLP width of the tower; the same of the language model, its key heads and vocabulary."""

    vision: tuple[int, int, int, int]
    language: tuple[int, int, int, int]
    key_heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape((4, 256, 4, 1024), (4, 256, 4, 960), 4, 1216),
    "1b": Shape((24, 1024, 16, 4096), (24, 896, 14, 4864), 2, 151674),
    "2b": Shape((24, 1024, 16, 4096), (28, 1536, 12, 8960), 2, 151674),
}


@dataclass(frozen=True)
class Case:
    """One group."""

    tiles: int
    tokens: int
    completions: int = 8
    mixed: bool = False
    """Completions of a quarter to the whole of `tokens`, instead of equal ones."""

    def __str__(self) -> str:
        return f"T={self.tiles} C={self.tokens}{' mixed' if self.mixed else ''} G={self.completions}"


class Work:
    """A model with random weights, its processor, and one recorded group."""

    def __init__(self, shape: Shape, case: Case, dtype: torch.dtype):
        self.case = case
        width, height, most = PICTURES[case.tiles]
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        vision, text = shape.vision, shape.language
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                num_hidden_layers=vision[0], hidden_size=vision[1], num_attention_heads=vision[2],
                intermediate_size=vision[3], image_size=[TILE, TILE], patch_size=[PATCH, PATCH], use_qk_norm=False,
            ),
            text_config=Qwen2Config(
                num_hidden_layers=text[0], hidden_size=text[1], num_attention_heads=text[2],
                intermediate_size=text[3], num_key_value_heads=shape.key_heads, vocab_size=shape.vocabulary,
                max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            ),
            image_token_id=tokenizer.context_image_token_id, image_seq_length=(TILE // PATCH // 2) ** 2,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.model = InternVLForConditionalGeneration(config).to(DEVICE, dtype)
        freeze_all_but(self.model, ["projector", "language_model"])
        self.processor = InternVLProcessor(
            image_processor(TILE, max_image_tiles=most), tokenizer,
            InternVLVideoProcessor(size={"height": TILE, "width": TILE}),
            image_seq_length=config.image_seq_length, chat_template=tokenizer.chat_template,
        )  # fmt: skip
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        self.row = {
            "id": "0",
            "prompt": [{"role": "user", "content": "How many red circles are there in the picture?"}],
            "images": [Image.fromarray(noise.numpy())],
        }
        step = 3 * case.tokens // (4 * max(1, case.completions - 1)) if case.mixed else 0
        lengths = [case.tokens - step * i for i in range(case.completions)]
        plain = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids and i != config.image_token_id]
        self.completion_ids = [[plain[i] for i in torch.randint(len(plain), (n,))] for n in lengths]
        self.settings = {
            "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": case.completions,
            "num_generations": case.completions, "max_completion_length": case.tokens, "bf16": False,
            "report_to": [], "use_cpu": DEVICE == "cpu", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 97 / 97 for ids in completion_ids]


class Baseline:
    """TRL's trainer with the recorded group in its own batch."""

    def __init__(self, work: Work, *, checkpointing: bool = False):
        trl.trainer.utils._use_triton = lambda device: True  # scores completion positions only, on a CPU too
        count = work.case.completions
        self.trainer = trl.GRPOTrainer(
            model=copy.deepcopy(work.model),
            reward_funcs=work.reward,
            args=trl.GRPOConfig(**work.settings, gradient_checkpointing=checkpointing),
            train_dataset=Dataset.from_list([{"prompt": work.row["prompt"]}]),
            processing_class=work.processor,
            rollout_func=lambda prompts, _: {
                "prompt_ids": _prompt_ids(work, count),
                "completion_ids": work.completion_ids,
                "logprobs": [[0.0] * len(ids) for ids in work.completion_ids],
            },
        )
        self.model = self.trainer.model.train()
        if checkpointing:  # as `train` does it
            self.model.gradient_checkpointing_enable(self.trainer.args.gradient_checkpointing_kwargs)
        else:  # the tower in eval mode is a setting that costs nothing, but no default
            part_module(self.model, "vision_encoder").eval()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batch = self.trainer._generate_and_score_completions([work.row] * count)

    def step(self) -> torch.Tensor:
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, self.batch)
        loss.backward()
        return loss.detach()

    def step_with_old_pass(self) -> torch.Tensor:
        batch = self.batch
        with torch.no_grad():
            self.trainer._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                batch["completion_ids"].size(1),
                pixel_values=batch["pixel_values"], num_images=batch["num_images"], num_tiles=batch.get("num_tiles"),
            )  # fmt: skip
        return self.step()


class Ours:
    """Our trainer with the same group in its buffer."""

    def __init__(self, work: Work, **changes: Any):
        self.trainer = GRPOTrainer(
            model=copy.deepcopy(work.model),
            reward_funcs=[work.reward],
            args=GRPOConfig(
                **{**work.settings, "gradient_checkpointing": False, "save_rollouts": False, **changes},
            ),
            train_dataset=[work.row],
            processing_class=work.processor,
            engine=_Recorded(work.completion_ids),
        )
        self.model = self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self._rows = self.trainer._prepare_inputs({})
        assert self.trainer._buffer is not None and self.trainer.share_prefix
        self._prompt = self.trainer._buffer.prompts[0]
        self._pixels = self._prompt.vision_inputs["pixel_values"]

    def step(self) -> torch.Tensor:
        """With the pictures seen anew."""
        self._prompt.vision_inputs["pixel_values"] = self._pixels
        return self.step_cached()

    def step_cached(self) -> torch.Tensor:
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, dict(self._rows))
        loss.backward()
        return loss.detach()


class _Recorded:
    def __init__(self, completion_ids: list[list[int]]):
        self._completions = [Completion(ids, [], "", is_truncated=True) for ids in completion_ids]

    def sync_weights(self, policy: nn.Module, version: int = 0) -> None:
        for completion in self._completions:
            completion.weight_version = version

    def generate(self, prompts: list, sampling: Any, *, seed: int) -> list[list[Completion]]:
        return [self._completions]


def _prompt_ids(work: Work, count: int) -> list[list[int]]:
    from r1v_rl.data.dataset import examples_from_rows
    from r1v_rl.rollout.prompts import encode_prompt

    (example,) = examples_from_rows([work.row], images_without_marks="prepend", answer_required=False)
    return [encode_prompt(work.processor, example, device="cpu").prompt_ids] * count


def gate(theirs: Baseline, ours: Ours, dtype: torch.dtype) -> str:
    """Refuse to time what does not agree."""
    loss_error = abs((theirs.step() - ours.step()).item())  # of a mean of numbers around 1, itself near 0
    gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == found.keys(), "the same tensors have gradients"
    errors = [((found[n] - g).norm() / g.norm().clamp(min=1e-9)).item() for n, g in gradients.items()]
    limits = (1e-6, 1e-5) if dtype == torch.float32 else (5e-2, 5e-2)
    assert loss_error < limits[0] and max(errors) < limits[1], f"loss {loss_error:.1e}, gradient {max(errors):.1e}"
    return f"loss {loss_error:.0e}, worst gradient {max(errors):.0e}"


def seconds(step: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def flops(
    shape: Shape,
    case: Case,
    prompt: int,
    *,
    shared: bool,
    tower: bool,
    passes: int = 0,
    gc: bool = False,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The cost model: FLOPs of one group's update.

    Trunk: 2 N n + 4 L h (keys seen), forward, and twice that backward (+ 1 with checkpointing); head: 4 products a
    scored position, since logits are computed again, 3 of ours where they are few enough to be kept; tower: one forward
    of 2 N n + 4 L h n^2 a tile. `passes` more forwards of tower and trunk.
    """
    tower_layers, tower_width, _, tower_mlp = shape.vision
    layers, width, heads, mlp = shape.language
    patches = (TILE // PATCH) ** 2 + 1
    vision = (
        case.tiles
        * tower_layers
        * (2 * (4 * tower_width**2 + 2 * tower_width * tower_mlp) * patches + 4 * tower_width * patches**2)
    )
    attention = 2 * width**2 + 2 * width**2 * shape.key_heads // heads
    weights = layers * (attention + 3 * width * mlp)
    g, c = case.completions, case.tokens
    if shared:
        tokens, seen = prompt + g * c, prompt**2 / 2 + g * (c * prompt + c * c / 2)
    else:
        tokens, seen = g * (prompt + c), g * (prompt + c) ** 2 / 2
    trunk = 2 * weights * tokens + 4 * layers * width * seen
    copies = 1 if shared else g
    head = 2 * width * shape.vocabulary * g * c
    head_passes = (3 if shared and may_keep(g * c * shape.vocabulary, dtype) else 4) + passes
    return (3 + gc + passes) * trunk + head_passes * head + copies * vision * (tower + passes + 2 * gc)


def matmul_rate(shape: Shape, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of this machine in the trunk's own matrix products, forward and both backward ones."""
    _, width, _, mlp = shape.language
    x, up, down = (torch.randn(s, device=DEVICE, dtype=dtype) for s in ((tokens, width), (mlp, width), (width, mlp)))
    hidden, square = torch.randn(tokens, mlp, device=DEVICE, dtype=dtype), torch.randn_like(up[:width, :width])

    def products() -> None:
        for weight, a, b in ((up, x, hidden), (up, x, hidden), (down, hidden, x), (square, x, x), (square, x, x)):
            a @ weight.T, b @ weight, b.T @ a

    work = 3 * 2 * tokens * (3 * width * mlp + 2 * width * width)
    seconds(products)
    return work / statistics.median(seconds(products) for _ in range(15))
