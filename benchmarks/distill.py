"""What the parts of `r1v-rl distill` do: length by penalty and budget, distilled against plain data, necessity.

    python benchmarks/distill.py [length] [controller] [data] [necessity] [--quick] [--json FILE] [--model FOLDER]
    python benchmarks/distill.py necessity --by rules --dataset puzzlevqa --dataset_root FOLDER --seeds 5

length      held-out rows answered at fixed repetition penalties, and at fixed token budgets: mean length, accuracy
controller  the same rows with the penalty of each row's own scores (rules, no judge), and without
data        `sft` on distilled chains and on plain ones (the model's first chain of a row, right or wrong), the same
            number of rows and steps: held-out accuracy with its 95 % interval, mean length
necessity   the ablation's score of rows with their pictures, with blank ones, and with those of other rows; `--by
            rules` without a model, each row with a picture of another one for every seed, and apart for the two halves
            of the rows by a hash of their ids (the rules were decided on the first half of PuzzleVQA and NLVR counting)

The model is outputs/tiny/start by default (`r1v-rl align --config recipes/tiny/align.yaml`). `--dataset` takes rows
from a file, such as outputs/small/data/counting_heldout.jsonl for the model of the small chain, or of a benchmark, such
as puzzlevqa, whose folder is in `--dataset_root`. In `--json`, ours and baseline are mean tokens for length and
controller (baseline: penalty 1, or the largest budget), accuracies for data, necessity of the right and of the changed
pictures.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (before torchvision is imported)
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from r1v_rl.config import DataConfig
from r1v_rl.data.chat import check_prompt_lengths, load_processor
from r1v_rl.data.dataset import load_configured_examples
from r1v_rl.data.export import write_parquet
from r1v_rl.data.images import load_image
from r1v_rl.distill.assess import combine, measure, necessity
from r1v_rl.distill.config import DistillConfig
from r1v_rl.distill.drawing import Sight, look
from r1v_rl.distill.necessity import UNKNOWN, necessity_by_rules
from r1v_rl.distill.pipeline import set_lengths
from r1v_rl.distill.records import Row
from r1v_rl.evaluate.accuracy import Answered, accuracy, answer_prompts, blanked
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.benchmarks.base import load_benchmark
from r1v_rl.evaluate.interval import Accuracy
from r1v_rl.evaluate.prompts import Instructions
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.judging import question_text
from r1v_rl.tracking.manifest import versions
from r1v_rl.types import Example

PENALTIES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
BUDGETS = (160, 96, 64, 48, 32, 16, 8)
PARTS = ("length", "controller", "data", "necessity")
ROOT = Path(__file__).parents[1]


@dataclass
class Bench:
    """The engine and the held-out rows."""

    engine: RolloutEngine
    processor: Any
    options: argparse.Namespace
    examples: Sequence[Example]
    prompts: list[EncodedPrompt]

    def answers(self, seed: int, prompts: Sequence[EncodedPrompt] | None = None, **sampling: Any) -> list[Answered]:
        drawn = Sampling(**{"num_generations": 1, "max_tokens": self.options.max_tokens, **sampling})
        return answer_prompts(
            self.engine, list(prompts or self.prompts), drawn, answer_kind=self.options.kind, timeout_s=2.0, seed=seed
        )


def main() -> None:
    options = _options()
    print(f"{versions()}\n{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    rows: list[dict] = []
    if options.by == "rules" and "necessity" in options.parts:
        options.parts.remove("necessity")
        rows += necessities_by_rules(options)
    with ExitStack() as stack:
        if set(options.parts) - {"data"}:
            bench = _bench(options, stack)
            for part in (length, controller, necessities):
                name = "necessity" if part is necessities else part.__name__
                if name in options.parts:
                    rows += part(bench)
    if "data" in options.parts:
        rows += data(options)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def length(bench: Bench) -> list[dict]:
    """Length and accuracy at fixed penalties, then at fixed budgets."""
    seeds = range(bench.options.seeds)
    found = []
    for name, values, key in (
        ("penalty", PENALTIES, "repetition_penalty"),
        ("token budget", BUDGETS, "max_tokens"),
    ):
        print(f"{name:>14}  tokens  cut off  accuracy, {len(bench.prompts)} rows x {len(seeds)} seeds")
        plain = 0.0
        for value in values:
            answered = [row for seed in seeds for row in bench.answers(seed, **{key: value})]
            tokens = statistics.fmean(len(row.completion.token_ids) for row in answered)
            cut = statistics.fmean(row.completion.is_truncated for row in answered)
            plain = plain or tokens
            print(f"{value:>14g}{tokens:>8.1f}{cut:>8.1%}  {accuracy(answered)}", flush=True)
            found.append(_row(f"{name} {value:g}", tokens, plain))
        print()
    return found


def controller(bench: Bench) -> list[dict]:
    """Every row with the penalty of its own scores, and without."""
    rows = [Row(example) for example in bench.examples]
    measure(rows, bench.processor)
    for row, needed in zip(rows, _necessities(bench, blanked_prompts(bench)), strict=True):
        row.sub_scores["necessity_by_ablation"] = needed
    combine(rows)
    set_lengths(rows, DistillConfig(model_name_or_path="-", output_dir="-", assessment="rules"))
    found = []
    print("controller      seed  tokens  accuracy")
    for seed in range(bench.options.seeds):
        plain = bench.answers(seed)
        ours = bench.answers(seed, repetition_penalty=[row.penalty for row in rows])
        for name, answered in (("off", plain), ("on", ours)):
            tokens = statistics.fmean(len(row.completion.token_ids) for row in answered)
            print(f"{name:<16}{seed:>4}{tokens:>8.1f}  {accuracy(answered)}", flush=True)
        means = [statistics.fmean(len(row.completion.token_ids) for row in answered) for answered in (ours, plain)]
        found.append(_row(f"controller seed {seed}", *means))
    penalties = sorted(row.penalty for row in rows)
    print(f"penalties {penalties[0]:.3f} to {penalties[-1]:.3f}, mean {statistics.fmean(penalties):.3f}\n")
    return found


def blanked_prompts(bench: Bench) -> list[EncodedPrompt]:
    return [encode_prompt(bench.processor, blanked(example), device="cpu") for example in bench.examples]


def necessities(bench: Bench) -> list[dict]:
    """Mean necessity with the right pictures, with blank ones, and with those of the next row."""
    examples = bench.examples
    shuffled = [replace(e, images=examples[(i + 1) % len(examples)].images) for i, e in enumerate(examples)]
    shuffled = [s if len(s.images) == len(e.images) else e for s, e in zip(shuffled, examples, strict=True)]
    sets = {"right": bench.prompts, "blank": blanked_prompts(bench)}
    sets["shuffled"] = [encode_prompt(bench.processor, example, device="cpu") for example in shuffled]
    means = {}
    print(f"pictures    necessity by ablation, {len(examples)} rows")
    for name, prompts in sets.items():
        scores = [score.value for score in _necessities(bench, sets["blank"], prompts) if score.value is not None]
        means[name] = statistics.fmean(scores)
        error = statistics.stdev(scores) / len(scores) ** 0.5
        print(f"{name:<12}{means[name]:.3f} +- {1.96 * error:.3f}", flush=True)
    print()
    return [_row(f"necessity, right against {name}", means["right"], means[name]) for name in ("blank", "shuffled")]


def necessities_by_rules(options: argparse.Namespace) -> list[dict]:
    """Mean necessity by rules with the right pictures, blank ones, and those of other rows; the paired difference."""
    examples = [example for example in _examples(options) if example.images]
    right = [_sights(example) for example in examples]
    scores = {"right": _scores(examples, right), "blank": _scores(examples, [_sights(blanked(e)) for e in examples])}
    shuffled = []
    for seed in range(options.seeds):
        order = random.Random(seed).sample(range(len(examples)), len(examples))
        other = dict(zip(order, order[1:] + order[:1], strict=True))
        shuffled.append(_scores(examples, [right[other[i]] for i in range(len(examples))]))
    scores["shuffled"] = [statistics.fmean(values) for values in zip(*shuffled, strict=True)]
    halves = [hashlib.sha256(example.id.encode()).digest()[0] % 2 for example in examples]
    print(f"necessity by rules, {options.dataset}, {options.seeds} shuffles")
    found = []
    for title, half in (("all", (0, 1)), ("first half", (0,)), ("second half", (1,))):
        chosen = [i for i, number in enumerate(halves) if number in half]
        by = {name: [values[i] for i in chosen] for name, values in scores.items()}
        means = ", ".join(f"{name} {_interval(values)}" for name, values in by.items())
        less = [a - b for a, b in zip(by["right"], by["shuffled"], strict=True)]
        unknown = statistics.fmean(value == UNKNOWN for value in by["right"])
        print(f"{title}, {len(chosen)} rows: {means}; right less shuffled {_interval(less)}; {unknown:.0%} unknown")
        for name in ("blank", "shuffled"):
            means = [statistics.fmean(by[one]) for one in ("right", name)]
            found.append(_row(f"necessity by rules, {title}, right against {name}", *means))
    return found


def _sights(example: Example) -> list[Sight]:
    return [look(load_image(source)) for source in example.images]


def _scores(examples: Sequence[Example], sights: Sequence[list[Sight]]) -> list[float]:
    return [
        necessity_by_rules(question_text(example), example.answer or "", example.columns.get("choices"), seen).value
        for example, seen in zip(examples, sights, strict=True)
    ]


def _interval(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} +- {1.96 * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _necessities(bench: Bench, blank: list[EncodedPrompt], prompts: list[EncodedPrompt] | None = None) -> list:
    seeing = bench.answers(0, prompts, temperature=0.0)
    blind = bench.answers(0, blank, temperature=0.0)
    return [necessity(s.verdict.correct, b.verdict.correct) for s, b in zip(seeing, blind, strict=True)]


def data(options: argparse.Namespace) -> list[dict]:
    """Two `sft` runs for each seed, and their held-out accuracy."""
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(_data(options, Path(folder), seed))
    return found


def _data(options: argparse.Namespace, folder: Path, seed: int) -> dict:
    _call(
        "distill", f"{folder}/none.yaml", model_name_or_path=options.model, output_dir=folder / "distill",
        dataset_name="scenes", dataset_size=options.train_rows, dataset_kwargs="{num_images: 1}", seed=seed,
        assessment="rules", alpha=options.alpha, num_generations=4, temperature=1.0, top_p=1.0,
        max_completion_length=160, answer_kind="text", dtype="float32", vllm_kv_cache_memory_bytes=2**28,
        serve_model="tiny/reasoning_llm", reviser_model="teacher", reviser_prompt="{written}", judge_images=False,
        serve_kwargs="{dtype: float32, enforce-eager: true, max-model-len: 1024}",
        reviser_kwargs="{temperature: 0.7, max_completion_tokens: 200}",
    )  # fmt: skip
    rows = pq.ParquetFile(folder / "distill/rows.parquet").read().to_pylist()
    distilled = pq.ParquetFile(folder / "distill/dataset.parquet").read().num_rows
    examples = load_configured_examples(
        DataConfig(dataset_name="scenes", dataset_size=options.train_rows, dataset_kwargs={"num_images": 1}), seed=seed
    )
    first = {row["id"]: row["chains"][0]["text"] for row in rows if row["chains"]}
    plain = [(example, {"completion": first[example.id]}) for example in examples if example.id in first][:distilled]
    write_parquet(folder / "plain.parquet", plain, {"completion": pa.string()})
    reached: dict[str, dict] = {}
    for name, path in (("distilled", folder / "distill/dataset.parquet"), ("plain", folder / "plain.parquet")):
        _call("sft", "recipes/tiny/sft.yaml", model_name_or_path=options.model, dataset_name=path,
              output_dir=folder / name, seed=seed, dataset_size=distilled, dataset_kwargs="{}")  # fmt: skip
        _call("evaluate", f"{folder}/none.yaml", model_name_or_path=folder / name, eval_dataset_name="scenes",
              eval_dataset_size=options.rows, eval_dataset_kwargs="{num_images: 1}", max_completion_length=160,
              answer_kind="text", vllm_kv_cache_memory_bytes=2**28, blank_images=False)  # fmt: skip
        reached[name] = json.loads((folder / name / "evaluation.json").read_text())
        share = Accuracy(**reached[name]["accuracy"])
        print(f"seed {seed} {name:<10}{distilled} rows  {share}  {reached[name]['mean_length']:.1f} tokens", flush=True)
    return _row(f"data seed {seed}", *[reached[name]["accuracy"]["value"] for name in ("distilled", "plain")])


def _call(command: str, recipe: str, **keys: Any) -> None:
    """One command, whose output is shown where it fails."""
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    config = ["--config", recipe] if Path(ROOT, recipe).exists() else []
    line = [sys.executable, "-m", "r1v_rl", command, *config, *words]
    finished = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(line)}\n{finished.stdout[-2000:]}{finished.stderr[-4000:]}")


def _bench(options: argparse.Namespace, stack: ExitStack) -> Bench:
    examples = _examples(options)
    processor = load_processor(options.model)
    longest = check_prompt_lengths(examples, processor, max_model_len=10**6, max_completion_length=options.max_tokens)
    engine = stack.enter_context(
        standalone_engine(
            options.model, processor, use_vllm=True, dtype="float32", max_model_len=longest + options.max_tokens,
            max_images=max(len(example.images) for example in examples), kv_cache_memory_bytes=options.kv_cache_bytes,
        )
    )  # fmt: skip
    prompts = [encode_prompt(processor, example, device="cpu") for example in examples]
    return Bench(engine, processor, options, examples, prompts)


def _examples(options: argparse.Namespace) -> Sequence[Example]:
    if options.dataset in BENCHMARKS and options.dataset != "scenes":
        bare = Instructions("", "")
        return load_benchmark(BENCHMARKS[options.dataset], bare, root=options.dataset_root, size=options.rows)
    kwargs = {"num_images": 1} if options.dataset == "scenes" else None
    config = DataConfig(
        dataset_name=options.dataset,
        dataset_root=options.dataset_root,
        dataset_kwargs=kwargs,
        dataset_size=options.rows,
    )
    return load_configured_examples(config, split="heldout" if kwargs else "train", seed=0)


def _row(case: str, ours: float, baseline: float) -> dict:
    ratio = ours / baseline if baseline else None
    return {
        "case": case,
        "ours": ours,
        "baseline": baseline,
        "ratio_median": ratio,
        "ratio_min": ratio,
        "ratio_max": ratio,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few rows, one seed; without `data`")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--model", default="outputs/tiny/start")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--dataset_root")
    parser.add_argument("--kind", default="text", help="of the answers: text, number, math, choice")
    parser.add_argument("--by", choices=["model", "rules"], default="model", help="who tells necessity")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--train_rows", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--max_tokens", type=int, default=160)
    parser.add_argument("--kv_cache_bytes", type=int, default=2**28)
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; received {', '.join(sorted(unknown))}")
    if options.quick:
        options.rows, options.seeds = 64, 1
        options.parts = [part for part in options.parts if part != "data"]
    return options


if __name__ == "__main__":
    main()
