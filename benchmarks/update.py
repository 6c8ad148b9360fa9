"""The update of one group against TRL's own GRPOTrainer: same weights, same prompt, pictures and completions.

    python benchmarks/update.py [--quick] [--shape tiny|1b|2b] [--dtype float32|bfloat16] [--json FILE]

A case is T tiles, C tokens a completion, G completions. TRL's trainer makes its own batch from recorded completions;
ours gets the same ones. Before any time is printed, loss and gradients must agree. Then forward and backward of the
group are timed in the order ABBA; what is printed is the median of the pairs' ratios with their range, against:

  best      gradient checkpointing off, vision tower frozen and in eval mode, LM head at completion positions only
  vLLM      the same, and the forward of old log-probabilities that TRL makes for rollouts by vLLM
  defaults  the same, with gradient checkpointing, which is TRL's default

`cached`: the tower's features are there already (`vision_features: cache`, or a second update on a rollout). Memory is
the peak above the model, each side in a process of its own. `limit`: time of the bare matrix products of the update.
The weights are random, which changes no time.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
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


CASES = [Case(1, 64), Case(5, 64), Case(5, 256), Case(1, 256), Case(5, 256, mixed=True)]
GPU_CASES = [Case(5, 256), Case(13, 512)]


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


# ---- measures ----------------------------------------------------------------------------------------------------


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


def pairs_of(ours: Callable, theirs: Callable, pairs: int) -> tuple[float, float, list[float]]:
    """Median seconds of both, and each pair's ratio, ABBA; the gate has warmed both up."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        order = ((0, ours), (1, theirs)) if pair % 2 == 0 else ((1, theirs), (0, ours))
        for side, step in order:
            times[side].append(seconds(step))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def flops(shape: Shape, case: Case, prompt: int, *, shared: bool, tower: bool, passes: int = 0, gc: bool = False):
    """The cost model: FLOPs of one group's update.

    Trunk: 2 N n + 4 L h (keys seen), forward, and twice that backward (+ 1 with checkpointing); head: 4 products a
    scored position; tower: one forward of 2 N n + 4 L h n^2 a tile. `passes` more forwards of tower and trunk.
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
    return (3 + gc + passes) * trunk + (4 + passes) * head + copies * vision * (tower + passes + 2 * gc)


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


def peak_memory(side: str, options: argparse.Namespace, case: Case) -> float:
    """MiB above the model, measured in a fresh process."""
    command = [sys.executable, __file__, "--shape", options.shape, "--dtype", options.dtype]
    command += ["--memory", side, json.dumps(asdict(case))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(side: str, work: Work) -> float:
    subject = Ours(work) if side == "ours" else Baseline(work, checkpointing=side == "defaults")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    subject.step()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return (peak - before) / 2**20


# ---- the tables --------------------------------------------------------------------------------------------------


def run_case(options: argparse.Namespace, case: Case, pairs: int) -> dict:
    shape, dtype = SHAPES[options.shape], getattr(torch, options.dtype)
    work = Work(shape, case, dtype)
    theirs, ours = Baseline(work), Ours(work)
    agreed = gate(theirs, ours, dtype)
    prompt = theirs.batch["prompt_ids"].shape[1]
    baselines: dict[str, Callable] = {"best": theirs.step}
    if not options.best_only:
        baselines["vLLM"] = theirs.step_with_old_pass
        baselines["defaults"] = Baseline(work, checkpointing=True).step_with_old_pass
    row: dict[str, Any] = {"case": str(case), "prompt": prompt, "agreement": agreed}
    for tower, step in (("", ours.step), (" cached", ours.step_cached)):
        for name, baseline in baselines.items():
            if tower and name == "vLLM":
                continue
            own, other, ratios = pairs_of(step, baseline, pairs)
            modelled = flops(
                shape, case, prompt, shared=False, tower=True, passes=name != "best", gc=name == "defaults"
            ) / flops(shape, case, prompt, shared=True, tower=not tower)
            row[name + tower] = {"seconds": own, "baseline": other, "ratio": statistics.median(ratios),
                                 "range": [min(ratios), max(ratios)], "model": modelled}  # fmt: skip
    rate = matmul_rate(shape, prompt + case.completions * case.tokens, dtype)
    limit = flops(shape, case, prompt, shared=True, tower=False) / rate
    row["limit"] = {"seconds": limit, "reached": limit / row["best cached"]["seconds"], "gflops": rate / 1e9}
    if not options.best_only:
        row["memory"] = {side: peak_memory(side, options, case) for side in ("ours", "best", "defaults")}
    return row


def show(row: dict) -> None:
    print(f"{row['case']}  (prompt {row['prompt']} tokens; {row['agreement']})")
    for name, found in row.items():
        if isinstance(found, dict) and "ratio" in found:
            low, high = found["range"]
            print(
                f"    against {name:<16}{found['seconds']:8.3f} s{found['baseline']:9.3f} s{found['ratio']:8.2f} "
                f"({low:.2f}-{high:.2f}), cost model {found['model']:.1f}"
            )
    print(f"    limit {row['limit']['seconds']:.3f} s at {row['limit']['gflops']:.0f} GFLOP/s, "
          f"reached {row['limit']['reached']:.0%} with features cached")  # fmt: skip
    if "memory" in row:
        memory = row["memory"]
        print(f"    peak memory above the model {memory['ours']:.0f} MiB, TRL {memory['best']:.0f} MiB, with its "
              f"defaults {memory['defaults']:.0f} MiB: {memory['best'] / memory['ours']:.1f} times less")  # fmt: skip
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, three pairs")
    parser.add_argument("--best-only", action="store_true", help="only TRL's best settings, no memory")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--case", nargs="*", help="such as T=5,C=64,G=8 instead of the usual ones")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        side, case = options.memory
        print(
            measure_memory(side, Work(SHAPES[options.shape], Case(**json.loads(case)), getattr(torch, options.dtype)))
        )
        return
    names = ("torch", "transformers", "trl")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{DEVICE}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"{options.shape}, {options.dtype}")  # fmt: skip
    cases = CASES if options.shape == "tiny" else GPU_CASES
    if options.case:
        keys = {"T": "tiles", "C": "tokens", "G": "completions"}
        cases = [Case(**{keys[p[0]]: int(p[2:]) for p in text.split(",")}) for text in options.case]
    rows = []
    for case in cases[:1] if options.quick else cases:
        rows.append(run_case(options, case, 3 if options.quick else options.pairs))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
