"""The tiny vision encoder, trained to say what stands in each cell; the heads that say it are thrown away."""

import logging
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import InternVLVisionConfig, InternVLVisionModel

from r1v_rl.data.scene_pictures import PICTURE_SIZE, draw_scene
from r1v_rl.data.scene_questions import COLORS, DIGITS, NUM_CELLS, SHAPES, Scene, sample_scene
from r1v_rl.models.compose import image_processor, shuffled_features
from r1v_rl.tiny.optimizers import muon_and_adamw, step_all, warm_and_decay

logger = logging.getLogger(__name__)
HEADS = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "digit": len(DIGITS) + 1, "cell": NUM_CELLS}


def encoder_config() -> InternVLVisionConfig:
    """96 px pictures, 16 px patches: 36 patches, 9 visual tokens after the pixel shuffle, one per cell."""
    return InternVLVisionConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=PICTURE_SIZE,
        patch_size=16,
        attention_bias=True,
        layer_scale_init_value=1.0,
    )


def cell_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """For each head the class of every cell, (pictures, 9); class 0 is an empty cell, but for `cell`, its place."""
    return {
        "color": torch.tensor([[COLORS.index(t.color) + 1 if t else 0 for t in s] for s in scenes]),
        "shape": torch.tensor([[SHAPES.index(t.shape) + 1 if t else 0 for t in s] for s in scenes]),
        "digit": torch.tensor([[t.digit if t else 0 for t in s] for s in scenes]),
        "cell": torch.arange(NUM_CELLS).repeat(len(scenes), 1),
    }


def picture_batches(split: str, seed: int, batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless (pixel values, labels) of fresh pictures."""
    processor = image_processor(PICTURE_SIZE)
    rng = random.Random(f"encoder-{split}-{seed}")
    while True:
        scenes = [sample_scene(rng, num_objects=rng.randint(2, 7), split=split) for _ in range(batch_size)]
        pixels = processor([draw_scene(s, rng) for s in scenes], return_tensors="pt")["pixel_values"]
        yield pixels, cell_labels(scenes)


@torch.no_grad()
def encoder_accuracy(encoder: nn.Module, heads: nn.ModuleDict, *, seed: int, num_batches: int = 10) -> dict[str, float]:
    """Accuracy of each head on held-out pictures; colour, shape and digit over the cells that are not empty."""
    encoder.eval()
    hits, seen = dict.fromkeys([*HEADS, "empty"], 0), dict.fromkeys([*HEADS, "empty"], 0)
    batches = picture_batches("heldout", seed, 50)
    for _ in range(num_batches):
        pixels, labels = next(batches)
        features = shuffled_features(encoder, pixels)
        for name, head in heads.items():
            guess, gold = head(features).argmax(-1), labels[name]
            hits[name] += int(((guess == gold) & (gold > 0)).sum())
            seen[name] += int((gold > 0).sum())
            if name == "color":
                hits["empty"] += int(((guess == 0) == (gold == 0)).sum())
                seen["empty"] += gold.numel()
    encoder.train()
    return {name: hits[name] / seen[name] for name in hits}


def train_encoder(
    output_dir: Path, *, steps: int = 3000, batch_size: int = 48, lr: float = 1e-3, seed: int = 0
) -> dict:
    """Trains the encoder, saves it, and returns its held-out accuracy per head."""
    torch.manual_seed(seed)
    encoder = InternVLVisionModel(encoder_config())
    width = encoder.config.hidden_size * 4
    heads = nn.ModuleDict({n: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, k)) for n, k in HEADS.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizers = muon_and_adamw(encoder, encoder.encoder, heads, lr=lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(warm_and_decay, steps=steps)) for o in optimizers]
    batches = picture_batches("train", seed, batch_size)
    for step in (bar := tqdm(range(1, steps + 1), desc="vision encoder", mininterval=10)):
        pixels, labels = next(batches)
        features = shuffled_features(encoder, pixels)
        losses = {
            n: nn.functional.cross_entropy(h(features).flatten(0, 1), labels[n].flatten()) for n, h in heads.items()
        }
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        step_all(optimizers, schedules)
        bar.set_postfix({n: f"{loss.item():.3f}" for n, loss in losses.items()}, refresh=False)
        if step % 500 == 0 or step == steps:
            accuracy = encoder_accuracy(encoder, heads, seed=seed)
            logger.info("vision encoder step %d: held-out accuracy %s", step, accuracy)
            encoder.save_pretrained(output_dir)
            image_processor(PICTURE_SIZE).save_pretrained(output_dir)
    return accuracy
