"""Packed projector alignment against `trl.SFTTrainer`, same model, same rows.

    python benchmarks/alignment.py [--quick] [--json FILE] [--model FOLDER]

Rows are of unlike length: text alone, one picture, one picture cut into tiles; short and long answers. Both sides train
the projector of the same frozen parts on every row once (or three times). The baseline is TRL with its own collator and
its best batch size, which is searched for first: rows in random order, and grouped by length. TRL refuses to group rows
with pictures, whose tokens it cannot count before it runs; the second baseline is given our counts. Time is all that a
run takes once the model is loaded: reading and tokenizing rows, pictures, steps. Tokens are those of the rows, padding
not counted. All sides run in turn, every other round in the opposite order; printed is the median of the rounds'
ratios with their range.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import datasets
import torch
import trl
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from r1v_rl.data.chat import limit_image_tiles
from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.data.scene_lessons import scene_lesson
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.parts import freeze_all_but
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.rows import TargetRows
from r1v_rl.sft.trainer import SFTTrainer
from r1v_rl.tiny.parts import resolve_part

BATCH_SIZES = (2, 4, 8, 16)
ROW_TOKENS = 2048
MAX_TILES = 12
SHEETS = [(2, 1), (1, 3), (2, 2), (3, 2), (4, 2), (4, 3)]
"""Columns and lines of tiles."""
SAMPLING = ("random", "group_by_length")
SHARES = {"text": 0.25, "one picture": 0.45, "tiles": 0.3}


@dataclass
class Case:
    name: str
    num_rows: int
    epochs: int
    vision_features: str


CASES = [Case("one epoch", 384, 1, "recompute"), Case("three epochs, kept features", 192, 3, "cache")]
"""The second is what `vision_features: cache` is for; TRL has no such thing, and sees every picture in every epoch."""


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Rows `id prompt images completion` of a few dozen to a thousand tokens; pictures are PNG bytes, as in files."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        lesson = scene_lesson("train", 0, index, ["brief"], num_images=0 if kind == "text" else 1)
        images = lesson["images"]
        if kind == "tiles":
            columns, lines = rng.choice(SHEETS)
            parts = [
                scene_lesson("train", 1, 100 * index + i, num_images=1)["images"][0] for i in range(columns * lines)
            ]
            images = [sheet(parts, columns)]
        text = lesson["problem"].replace("<image>", "").strip()
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        num_chains = min(8, int(rng.lognormvariate(0.2, 0.9)))
        chains = [scene_lesson("train", 2, 100 * index + i, ["careful"])["completion"] for i in range(num_chains)]
        rows.append(
            {
                "id": str(index),
                "prompt": [{"role": "user", "content": content}],
                "images": [png(image) for image in images],
                "completion": "\n".join([*chains, lesson["completion"]]),
            }
        )
    return rows


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side: the processor cuts it into as many tiles and adds a thumbnail."""
    width, height = pictures[0].size
    whole = Image.new("RGB", (columns * width, len(pictures) // columns * height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Side:
    """One trainer on one set of rows; a fresh copy of the model each time."""

    def __init__(self, folder: str, rows: list[dict[str, Any]], case: Case):
        self.folder, self.rows, self.case = folder, rows, case
        self.processor = AutoProcessor.from_pretrained(folder)
        limit_image_tiles(self.processor, MAX_TILES)
        examples = examples_from_rows(rows, answer_required=False)
        self.lengths = TargetRows(examples, self.processor).lengths
        self.tokens = sum(self.lengths) * case.epochs
        self.padding = 0.0

    def settings(self, output_dir: str, **changes: Any) -> dict[str, Any]:
        cpu = not torch.cuda.is_available()
        return {
            "output_dir": output_dir, "num_train_epochs": self.case.epochs, "use_cpu": cpu, "bf16": not cpu,
            "learning_rate": 1e-3, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
            "logging_strategy": "no", "disable_tqdm": True, "seed": 0, **changes,
        }  # fmt: skip

    def model(self):
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype="float32")
        return model if not torch.cuda.is_available() else model.cuda()

    def timed(self, make: Any) -> float:
        """Seconds to make the trainer and to train."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            model = self.model()
            started = time.perf_counter()
            trainer = make(model, folder)
            trainer.train()
            seconds = time.perf_counter() - started
        self.trainer = trainer
        return seconds


class Packed(Side):
    """Ours."""

    def run(self) -> float:
        def make(model, folder):
            args = SFTConfig(
                **self.settings(folder, per_device_train_batch_size=1),
                packing=True,
                max_length=ROW_TOKENS,
                trainable=["projector"],
                vision_features=self.case.vision_features,
            )
            return SFTTrainer(model, args, self.rows, processing_class=self.processor)

        seconds = self.timed(make)
        self.padding = self.trainer.state.log_history[-1]["packing/padding_share"]
        return seconds


class Trl(Side):
    """TRL's own trainer and collator."""

    def __init__(self, folder: str, rows: list[dict[str, Any]], case: Case, batch_size: int, sampling: str):
        super().__init__(folder, rows, case)
        self.batch_size, self.sampling = batch_size, sampling
        end = self.processor.tokenizer.eos_token
        texts = [
            self.processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        self.dataset = datasets.Dataset.from_dict(
            {
                "prompt": texts,
                "completion": [row["completion"] + end for row in rows],
                "images": [[{"bytes": image, "path": None} for image in row["images"]] for row in rows],
                "length": self.lengths,
            },
            features=datasets.Features(
                {
                    "prompt": datasets.Value("string"),
                    "completion": datasets.Value("string"),
                    "images": datasets.List(datasets.Image()),
                    "length": datasets.Value("int64"),
                }
            ),
        )

    def run(self) -> float:
        widths: list[tuple[int, int]] = []

        def make(model, folder):
            freeze_all_but(model, ["projector"])
            # else a batch of text alone, whose loss depends on nothing that trains, would stop TRL's run
            model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
            args = trl.SFTConfig(
                **self.settings(
                    folder,
                    per_device_train_batch_size=self.batch_size,
                    train_sampling_strategy=self.sampling,
                    remove_unused_columns=False,
                    max_length=None,
                )
            )
            trainer = trl.SFTTrainer(model, args, train_dataset=self.dataset, processing_class=self.processor)
            collate = trainer.data_collator

            def counted(rows):
                batch = collate([{k: v for k, v in row.items() if k != "length"} for row in rows])
                widths.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
                return batch

            trainer.data_collator = counted
            return trainer

        seconds = self.timed(make)
        self.padding = 1 - sum(n for n, _ in widths) / sum(slots for _, slots in widths)
        return seconds


def best_batch_size(folder: str, rows: list[dict[str, Any]], sampling: str, sizes: tuple[int, ...]) -> int:
    """TRL's fastest one on these rows."""
    case = Case("search", len(rows), 1, "recompute")
    seconds = {}
    for batch_size in sizes:
        side = Trl(folder, rows, case, batch_size, sampling)
        seconds[batch_size] = side.run()
        speed = side.tokens / seconds[batch_size]
        print(f"  {sampling:<16} batches of {batch_size:>2}{speed:>8.0f} tokens/s  padding {100 * side.padding:.0f} %")
    return min(seconds, key=lambda size: seconds[size])


def measure(case: Case, folder: str, batch_sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """One line for each baseline; all sides in turn, every other round in the opposite order."""
    rows = mixed_rows(case.num_rows)
    ours = Packed(folder, rows, case)
    baselines = [Trl(folder, rows, case, size, sampling) for sampling, size in batch_sizes.items()]
    times: dict[Side, list[float]] = {side: [] for side in (ours, *baselines)}
    for number in range(rounds):
        for side in list(times) if number % 2 == 0 else reversed(list(times)):
            times[side].append(side.run())
    results = []
    for theirs in baselines:
        ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
        ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
        mine, other = (side.tokens / statistics.median(times[side]) for side in (ours, theirs))
        name = f"{case.name}, TRL {theirs.sampling}"
        print(
            f"{name:<46}{mine:>8.0f}{other:>8.0f}{ratio:>7.2f}  {low:.2f}-{high:.2f}"
            f"{100 * ours.padding:>7.0f} %{100 * theirs.padding:>5.0f} %",
            flush=True,
        )
        results.append(
            {
                "case": name,
                "ours": mine,
                "baseline": other,
                "ratio_median": ratio,
                "ratio_min": low,
                "ratio_max": high,
                "padding_ours": ours.padding,
                "padding_baseline": theirs.padding,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the rows, three rounds, two batch sizes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--model", help="a VLM folder; by default the shipped tiny parts, put together")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("versions " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as composed:
        folder = options.model or composed
        if options.model is None:
            parts = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")
            compose_vlm(*parts, composed, max_image_tiles=MAX_TILES)
        cases = [Case(c.name, c.num_rows // (3 if options.quick else 1), c.epochs, c.vision_features) for c in CASES]
        rows = mixed_rows(cases[0].num_rows)
        lengths = sorted(Packed(folder, rows, cases[0]).lengths)
        print(f"rows of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}\n")
        sizes = BATCH_SIZES[1:3] if options.quick else BATCH_SIZES
        batch_sizes = {sampling: best_batch_size(folder, rows, sampling, sizes) for sampling in SAMPLING}
        print(f"\n{'tokens/s':<46}{'packed':>8}{'TRL':>8}{'ratio':>7}  range    padding: packed, TRL")
        results = [
            line for case in cases for line in measure(case, folder, batch_sizes, rounds=3 if options.quick else 7)
        ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
