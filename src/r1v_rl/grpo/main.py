"""`r1v-rl grpo`: from a recipe to a trained model, with what it learned measured before and after."""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from trl import ModelConfig, get_peft_config

from r1v_rl.config import DataConfig, build_configs, dump_recipe, read_recipe
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import heldout_examples, load_configured_examples
from r1v_rl.data.scenes import chance_accuracy
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.accuracy import Accuracy
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.benchmarks.base import load_benchmark
from r1v_rl.evaluate.grounding import grounding_lines
from r1v_rl.evaluate.prompts import Instructions
from r1v_rl.grpo.config import GRPOConfig, RunConfig
from r1v_rl.grpo.preflight import context_of, longest_prompt, try_rewards
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.tracking.manifest import write_run_manifest
from r1v_rl.tracking.redaction import redact
from r1v_rl.tracking.report import write_report
from r1v_rl.training.launch import (
    check_output_dir,
    check_processes,
    exit_code,
    resume_value,
    say_contamination,
    take_model_keys,
)
from r1v_rl.training.ranks import watched_ranks
from r1v_rl.types import Example

SUMMARY = "summary.json"
CONFIGS = (RunConfig, GRPOConfig, DataConfig, ModelConfig)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the run is done, 130 after Ctrl-C and 143 after SIGTERM (a checkpoint is left)."""
    started = time.perf_counter()
    values = read_recipe(CONFIGS, argv, prog="r1v-rl grpo")
    run, args, data, model = build_configs(CONFIGS, values)
    resume = resume_value(args)
    check_output_dir(args, resume)
    trainer = build_trainer(run, args, data, model)
    if trainer.accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "config.yaml").write_text(dump_recipe(redact(values)))
    with watched_ranks(args):
        before = _accuracy_before(trainer, resume)
        trainer.train(resume_from_checkpoint=resume)
        if trainer.stopped_by is not None:
            return exit_code(trainer.stopped_by)
        trainer.save_model(args.output_dir)
        summary = _measure(trainer, before, started)
        _finish(trainer, values, model, summary)
    return 0


def build_trainer(run: RunConfig, args: GRPOConfig, data: DataConfig, model: ModelConfig) -> GRPOTrainer:
    """A trainer whose data, prompts and rewards are checked: what is wrong with a recipe is said before it trains."""
    if data.dataset_name is None:
        raise RecipeError("`dataset_name` must name the training rows: `scenes`, a file, a folder or a hub id")
    take_model_keys(args, model)
    processor = load_processor(model.model_name_or_path, data.max_image_tiles)
    train = load_configured_examples(data, seed=args.seed)
    heldout = heldout_examples(run, data, args.seed)
    sets = eval_sets(run, args, data)
    asked = [*heldout, *itertools.chain(*sets.values())]
    check_measured(run, args, asked)
    say_contamination(train, asked, data)
    longest = longest_prompt([*train, *asked], processor, context_of(model.model_name_or_path, args), args)
    args.vllm_max_model_length = longest + args.max_completion_length
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=list(run.reward_funcs),
        args=args,
        train_dataset=train,
        eval_dataset={"heldout": heldout or None, **sets},
        processing_class=processor,
        peft_config=get_peft_config(model),
    )
    check_processes(trainer)
    try_rewards(trainer.reward_stage, train, processor, args)
    return trainer


def eval_sets(run: RunConfig, args: GRPOConfig, data: DataConfig) -> dict[str, Sequence[Example]]:
    """The sets of `eval_on`: of a path the name without folder and ending, else the name itself."""
    sets: dict[str, Sequence[Example]] = {}
    for name in run.eval_on or []:
        if name in BENCHMARKS and BENCHMARKS[name].make is None:
            sets[name] = load_benchmark(
                BENCHMARKS[name],
                Instructions(),
                root=run.eval_on_root,
                size=run.eval_on_size,
                seed=args.seed,
                system_prompt=data.system_prompt,
            )
        else:
            one = replace(run, eval_dataset_name=name, eval_dataset_size=run.eval_on_size)
            sets[Path(name).stem] = heldout_examples(one, data, args.seed)
    return sets


def check_measured(run: RunConfig, args: GRPOConfig, asked: Sequence[Example]) -> None:
    """Raises RecipeError where something is to be measured during training, and there are no rows for it."""
    if run.eval_on and args.eval_strategy == "no":
        raise RecipeError("`eval_on` is measured every `eval_steps`: set `eval_strategy: steps` and `eval_steps`")
    if args.eval_strategy != "no" and not asked:
        raise RecipeError("`eval_strategy` needs rows to answer: set `eval_dataset_name` or `eval_on`")
    if args.grounding_every and sum(bool(example.images) for example in asked) < 2:
        raise RecipeError("`grounding_every` needs at least two held-out rows with pictures: set `eval_dataset_name`")


def _accuracy_before(trainer: GRPOTrainer, resume: str | bool | None) -> Accuracy | None:
    """Held-out accuracy of the starting model; a resumed run takes it from `summary.json`."""
    path = Path(trainer.args.output_dir, SUMMARY)
    if not trainer.eval_examples:
        return None
    if resume:
        found = json.loads(path.read_text()).get("accuracy_before") if path.exists() else None
        return Accuracy(**found) if found else None
    before = trainer.heldout_accuracy()
    if trainer.accelerator.is_main_process:
        print(f"held-out accuracy before training: {before}", flush=True)
        path.write_text(json.dumps({"accuracy_before": asdict(before)}) + "\n")
    return before


def _measure(trainer: GRPOTrainer, before: Accuracy | None, started: float) -> dict:
    """What the run reached on held-out rows, with pictures and with blank ones; the first process says it."""
    summary: dict = {}
    said: list[str] = []
    if trainer.eval_examples:
        after, blank = trainer.heldout_accuracy(), trainer.heldout_accuracy(blank=True)
        summary = {
            "num_heldout": len(trainer.eval_examples),
            "accuracy_before": asdict(before) if before is not None else None,
            "accuracy_after": asdict(after),
            "blank_image_accuracy": blank.value,
        }
        lines: dict[str, object] = {"before": before, "after": after, "after, blank pictures": blank}
        templates = [{**e.columns, "answer": e.answer} for e in trainer.eval_examples if "template" in e.columns]
        if templates:
            summary["chance_accuracy"] = chance_accuracy(templates)
            lines["best constant answers"] = f"{100 * summary['chance_accuracy']:.1f} %"
        said += [f"\nheld-out accuracy, greedy, {len(trainer.eval_examples)} rows, 95 % interval"]
        said += [f"  {name:<24}{'not measured' if value is None else value}" for name, value in lines.items()]
    if trainer.args.grounding_every:
        summary["grounding"] = trainer.grounding()
        said += [f"  {line}" for line in grounding_lines(summary["grounding"])]
    summary["seconds"] = round(time.perf_counter() - started, 1)
    if trainer.accelerator.is_main_process:
        print("\n".join([*said, f"{summary['seconds']:.0f} s in all"]), flush=True)
    return summary


def _finish(trainer: GRPOTrainer, values: dict, model: ModelConfig, summary: dict) -> None:
    weight_hashes = trainer.part_hashes()
    if not trainer.accelerator.is_main_process:
        return
    output_dir = Path(trainer.args.output_dir)
    (output_dir / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    write_run_manifest(
        output_dir,
        stage="grpo",
        parent=model.model_name_or_path,
        config=values,
        data_hash=trainer.data_hash(),
        weight_hashes=weight_hashes,
        seeds={"seed": trainer.args.seed},
        metrics=summary,
    )
    print(f"report: {write_report(output_dir)}", flush=True)
