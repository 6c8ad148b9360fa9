"""The checks of each command's recipe: what it would read, how its batches come out, what its rewards say."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from r1v_rl import assembly
from r1v_rl.check.report import NotHere, Report
from r1v_rl.config import DataConfig, HeldoutConfig, build_configs
from r1v_rl.data.chat import load_processor
from r1v_rl.data.contamination import check_contamination
from r1v_rl.data.dataset import heldout_examples, load_configured_examples
from r1v_rl.distill import config as distill_config
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate import heldout as evaluation
from r1v_rl.evaluate import main as evaluate_main
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.gold import check_golds
from r1v_rl.evaluate.tested_rows import tested_rows
from r1v_rl.grpo import main as grpo_main
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.preflight import context_of, how_prompts_run, longest_prompt, try_rewards
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.grpo.tail import Tail
from r1v_rl.models.compose import language_model_type
from r1v_rl.models.encoders import encoder_type
from r1v_rl.models.families import check_family
from r1v_rl.models.packing import check_packing
from r1v_rl.models.transfer import check_hidden_size, substitute_config
from r1v_rl.scoring.scorers import make_scorer
from r1v_rl.sft import main as sft_main
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.iterate import config as iterate_config
from r1v_rl.sft.iterate.rounds import check_columns
from r1v_rl.sft.packing import pack
from r1v_rl.sft.rows import TargetRows
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.training.launch import unloaded_model
from r1v_rl.types import Example

CONFIGS: dict[str, tuple[type, ...]] = {
    "compose": assembly.COMPOSE_CONFIGS,
    "align": sft_main.ALIGN_CONFIGS,
    "transfer": assembly.TRANSFER_CONFIGS,
    "sft": sft_main.SFT_CONFIGS,
    "distill": distill_config.CONFIGS,
    "iterate": iterate_config.CONFIGS,
    "grpo": grpo_main.CONFIGS,
    "evaluate": evaluate_main.CONFIGS,
}
"""Command -> the classes whose fields are its recipe keys."""


def check_grpo(values: dict[str, Any], report: Report) -> None:
    """Rows, model, batch, prompt lengths, rewards."""
    run, train, data, model = build_configs(grpo_main.CONFIGS, on_this_machine(values, report))
    print(f"checking {data.dataset_name} with {model.model_name_or_path}")
    examples = report.look("data", lambda: _data(data, train.seed, report))
    heldout = [*_heldout(run, data, train.seed, report)]
    heldout += report.look("measured", lambda: _measured(run, train, data, heldout)) or []
    _overlap(examples, heldout, data, report)
    processor = report.look("model", lambda: _trained_model(model.model_name_or_path, data, report))
    report.look("batch", lambda: _rollout_batch(examples, train))
    if examples is not None and processor is not None:
        report.look("prompts", lambda: _prompts([*examples, *heldout], processor, model.model_name_or_path, train))
    if processor is not None:
        report.look("update", lambda: (how_prompts_run(model, train), None))
    report.look("rewards", lambda: _rewards(examples, processor, run.reward_funcs, train))


def check_sft(values: dict[str, Any], report: Report) -> None:
    """Rows and their targets, model, lengths, batch."""
    args, data, heldout, model = build_configs(sft_main.SFT_CONFIGS, on_this_machine(values, report))
    if data.dataset_name is None:
        raise RecipeError("`dataset_name` must name the training rows: `scenes`, a file, a folder or a hub id")
    print(f"checking {data.dataset_name} with {model.model_name_or_path}")
    examples = report.look("data", lambda: _data(data, args.seed, report, answer_required=False))
    rows_of_test = _heldout(heldout, data, args.seed, report, answer_required=False)
    _overlap(examples, rows_of_test, data, report)
    processor = report.look("model", lambda: _trained_model(model.model_name_or_path, data, report))
    rows = None
    if examples is not None and processor is not None:
        rows = report.look("targets", lambda: _targets(examples, processor, args))
    if processor is not None and (args.packing or args.padding_free):
        report.look("packing", lambda: _packing(model.model_name_or_path))
    report.look("batch", lambda: _training_batch(rows, args))


def check_align(values: dict[str, Any], report: Report) -> None:
    """As `check_sft`; parts that are joined first are looked at by their configurations."""
    args, data, heldout, model, parts = build_configs(sft_main.ALIGN_CONFIGS, on_this_machine(values, report))
    if not model.model_name_or_path and not (parts.vision_encoder and parts.language_model):
        raise RecipeError("align needs `model_name_or_path`, or both `vision_encoder` and `language_model`")
    print(f"checking {data.dataset_name} with {model.model_name_or_path or parts.language_model}")
    examples = report.look("data", lambda: _data(data, args.seed, report, answer_required=False))
    rows_of_test = _heldout(heldout, data, args.seed, report, answer_required=False)
    _overlap(examples, rows_of_test, data, report)
    processor = None
    if model.model_name_or_path:
        processor = report.look("model", lambda: _trained_model(model.model_name_or_path, data, report))
    else:
        _parts(parts.vision_encoder, parts.language_model, report)
    rows = None
    if examples is not None and processor is not None:
        rows = report.look("targets", lambda: _targets(examples, processor, args))
    if processor is not None and (args.packing or args.padding_free):
        report.look("packing", lambda: _packing(model.model_name_or_path))
    report.look("batch", lambda: _training_batch(rows, args))


def check_iterate(values: dict[str, Any], report: Report) -> None:
    """Rounds, scorer, rows, model, batch."""
    recipe = iterate_config.build_recipe(on_this_machine(values, report))
    model, rounds = str(values["model_name_or_path"]), recipe.iterate
    print(f"checking {recipe.data.dataset_name} with {model}")
    taus = ", ".join(f"score >= {t} at {r:g}" for t, r in zip(rounds.taus, rounds.learning_rates, strict=True))
    report.look("rounds", lambda: (f"{rounds.num_rounds}: {taus}", None))
    report.look("scorer", lambda: _scorer(recipe, report))
    examples = report.look("data", lambda: _data(recipe.data, recipe.training.seed, report))
    if examples is not None:
        report.look("columns", lambda: _columns(examples))
    tested = _heldout(recipe.heldout, recipe.data, recipe.training.seed, report, answer_required=False)
    _overlap(examples, tested, recipe.data, report)
    report.look("model", lambda: _trained_model(model, recipe.data, report))
    report.look("batch", lambda: _training_batch(None, recipe.training))


def check_distill(values: dict[str, Any], report: Report) -> None:
    """Judge and teacher by name, rows, evaluation rows, model."""
    recipe = distill_config.build_recipe(values)
    config = recipe.distill
    print(f"checking {recipe.data.dataset_name} with {config.model_name_or_path}")
    if config.serve_model is not None:
        report.look("server", lambda: _language_model(str(config.serve_model), report))
    asked = {"assessed": config.judge_model, "revised": config.reviser_model}
    report.look("asked", lambda: (", ".join(f"{what} by {name or 'nobody'}" for what, name in asked.items()), None))
    examples = report.look("data", lambda: _data(recipe.data, config.seed, report))
    _overlap(examples, _heldout(recipe.heldout, recipe.data, config.seed, report), recipe.data, report)
    if examples is not None:
        report.look("columns", lambda: _columns(examples))
    report.look("model", lambda: _processor(config.model_name_or_path, recipe.data, report))


def check_compose(values: dict[str, Any], report: Report) -> None:
    """Both parts, by their configurations."""
    (config,) = build_configs(assembly.COMPOSE_CONFIGS, values)
    print(f"checking {config.vision_encoder} and {config.language_model}")
    _parts(config.vision_encoder, config.language_model, report)


def check_transfer(values: dict[str, Any], report: Report) -> None:
    """Both models, by their configurations: the projector must write what the language model reads."""
    (config,) = build_configs(assembly.TRANSFER_CONFIGS, values)
    print(f"checking {config.projector_from} and {config.language_model}")
    llm = report.look("language", lambda: _language_model(config.language_model, report))
    substitute = report.look("projector", lambda: _substitute(config.projector_from, report))
    if llm is not None and substitute is not None:
        report.look("hidden", lambda: _same_size(substitute, llm, config))


def check_evaluate(values: dict[str, Any], report: Report) -> None:
    """Both sets of rows, model, prompt lengths."""
    config, data = build_configs(evaluate_main.CONFIGS, values)
    what = ", ".join(config.benchmarks) if config.benchmarks else config.eval_dataset_name
    print(f"checking {what} with {config.model_name_or_path}")
    rows = list(_heldout(config, data, config.seed, report))
    rows += _heldout(evaluation.text_rows_of(config), data, config.seed, report, subject="text rows")
    if config.benchmarks:
        rows += report.look("items", lambda: _benchmarks(config, data, report)) or []
    processor = report.look("model", lambda: _processor(config.model_name_or_path, data, report))
    if processor is not None and rows:
        report.look("prompts", lambda: (f"longest {evaluation.longest_prompt(config, processor, rows)} tokens", None))
    report.look("scoring", lambda: ("settings can be read", config.rewards()))


def _benchmarks(config: evaluation.EvaluationConfig, data: DataConfig, report: Report) -> tuple[str, Sequence[Example]]:
    assert not isinstance(config.benchmark_paths, str)
    report.place.require("benchmark_root", config.benchmark_root)
    for name in config.benchmarks or () if config.benchmark_root is None else ():
        report.place.require("benchmarks", (config.benchmark_paths or {}).get(name) or BENCHMARKS[name].hub_id)
    found = evaluation.benchmark_examples(config, data)
    for name, rows in found.items():
        print(f"  {name}: {check_golds(rows, timeout_s=config.reward_timeout_s)}", flush=True)
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in found.items())
    return sizes, [example for rows in found.values() for example in rows]


def on_this_machine(values: dict[str, Any], report: Report) -> dict[str, Any]:
    """The keys without what needs an accelerator that is not here, where that is allowed."""
    if report.place.missing_ok and not torch.cuda.is_available() and not values.get("use_cpu"):
        print("  device    not checked here: no accelerator on this machine")
        return {**values, "use_cpu": True}
    return values


# ---- data ----------------------------------------------------------------------------------------------------------


def _data(
    data: DataConfig, seed: int, report: Report, *, answer_required: bool = True
) -> tuple[str, Sequence[Example]]:
    report.place.require("dataset_name", data.dataset_name)
    report.place.require("dataset_root", data.dataset_root)
    return _described(load_configured_examples(data, seed=seed, answer_required=answer_required))


def _measured(
    run: grpo_main.RunConfig, args: grpo_main.GRPOConfig, data: DataConfig, heldout: Sequence[Example]
) -> tuple[str, Sequence[Example]]:
    """What is asked while a GRPO run trains, and the rows of `eval_on`."""
    if run.eval_dataset_name is not None and not heldout:
        raise NotHere("the held-out rows")
    sets = grpo_main.eval_sets(run, args, data)
    rows = [row for examples in sets.values() for row in examples]
    grpo_main.check_measured(run, args, [*heldout, *rows])
    found = [f"{name} ({len(examples)} rows)" for name, examples in sets.items()]
    found += ["held-out rows"] if args.eval_strategy != "no" and not sets else []
    found += [f"grounding every {args.grounding_every} steps"] if args.grounding_every else []
    return f"while it trains: {', '.join(found) or 'nothing'}", rows


def _heldout(
    heldout: HeldoutConfig,
    data: DataConfig,
    seed: int,
    report: Report,
    *,
    answer_required: bool = True,
    subject: str = "held-out",
) -> Sequence[Example]:
    """The rows; none where the recipe names none, or they cannot be read."""
    if heldout.eval_dataset_name is None:
        return []

    def find() -> tuple[str, Sequence[Example]]:
        report.place.require("eval_dataset_name", heldout.eval_dataset_name)
        report.place.require("dataset_root", data.dataset_root)
        return _described(heldout_examples(heldout, data, seed, answer_required=answer_required))

    return report.look(subject, find) or []


def _overlap(examples: Sequence[Example] | None, heldout: Sequence[Example], data: DataConfig, report: Report) -> None:
    """Training rows that are test rows, where there are any to compare with."""
    if examples is None or not (heldout or data.contamination_benchmarks):
        return

    def find() -> tuple[str, None]:
        for entry in data.contamination_benchmarks or ():
            report.place.require("contamination_benchmarks", entry.partition("=")[2])
        return check_contamination(examples, tested_rows(heldout, data), data.contamination_check), None

    report.look("overlap", find)


def _described(examples: Sequence[Example]) -> tuple[str, Sequence[Example]]:
    counts = [len(example.images) for example in examples]
    with_images = sum(map(bool, counts))
    return f"{len(counts)} rows, {with_images} with images, {max(counts)} images in one at most", examples


# ---- models --------------------------------------------------------------------------------------------------------


def _trained_model(name: str | None, data: DataConfig, report: Report) -> tuple[str, Any]:
    """The processor of a model that the trainers know."""
    found = _processor(name, data, report)
    check_family(str(name))
    return found


def _processor(name: str | None, data: DataConfig, report: Report) -> tuple[str, Any]:
    report.place.require("model_name_or_path", name)
    processor = load_processor(name, data.max_image_tiles)
    return f"{type(processor).__name__} of {name}", processor


def _parts(vision_encoder: str, language_model: str, report: Report) -> None:
    report.look("encoder", lambda: _encoder(vision_encoder, report))
    report.look("language", lambda: _language_model(language_model, report))


def _encoder(name: str, report: Report) -> tuple[str, str]:
    report.place.require("vision_encoder", name)
    kind = encoder_type(resolve_part(name))
    return f"{name} is a {kind}", kind


def _language_model(name: str, report: Report) -> tuple[str, Any]:
    report.place.require("language_model", name)
    kind = language_model_type(resolve_part(name))
    config = AutoConfig.from_pretrained(resolve_part(name))
    return f"{name} is a {kind}, hidden size {config.hidden_size}", config


def _substitute(name: str, report: Report) -> tuple[str, Any]:
    report.place.require("projector_from", name)
    config = substitute_config(name)
    return f"{name} writes vectors of {config.text_config.hidden_size}", config


def _same_size(substitute: Any, llm: Any, config: assembly.TransferConfig) -> tuple[str, None]:
    check_hidden_size(substitute, llm, config.projector_from, config.language_model)
    return f"size {llm.hidden_size} on both sides", None


def _columns(examples: Sequence[Example]) -> tuple[str, None]:
    check_columns(examples)
    return "can be kept as parquet", None


def _scorer(recipe: iterate_config.Recipe, report: Report) -> tuple[str, None]:
    config = recipe.scorers
    if config.scorer == "reward_model":
        report.place.require("reward_model", config.reward_model)
        raise NotHere(f"`reward_model` {config.reward_model} is weights")
    if config.scorer == "rubric":
        return f"rubric, judged by {config.judge_model} (not asked)", None
    make_scorer(config)
    return config.scorer, None


# ---- batches and rewards -------------------------------------------------------------------------------------------


def _rollout_batch(examples: Sequence[Example] | None, train: GRPOConfig) -> tuple[str, None]:
    assert train.generation_batch_size is not None and train.num_generations is not None
    num_prompts = train.generation_batch_size // train.num_generations
    line = f"{num_prompts} prompts x {train.num_generations} completions a rollout"
    if examples is None:
        return f"{line} of one process", None
    sampler = PromptSampler(
        len(examples),
        prompts_per_generation=num_prompts,
        micro_steps_per_generation=1,
        shuffle=bool(train.shuffle_dataset),
        seed=train.seed,
    )
    if train.over_provision:
        Tail(num_prompts, train.over_provision, train.partial_rollouts).check(sampler, world=1)
    return f"{line}, {sampler.generations_per_epoch} rollouts an epoch", None


def _training_batch(rows: TargetRows | None, args: SFTConfig) -> tuple[str, None]:
    """Packed rows or samples a step on one process, steps an epoch."""
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    unit = f"rows of {args.max_length} tokens" if args.packing else "samples"
    line = f"{size} {unit} a step and process"
    if rows is None:
        return line, None
    num_rows = len(pack(rows.lengths, range(len(rows)), args.max_length or 0)) if args.packing else len(rows)
    num_steps = -(-num_rows // size)
    steps = args.max_steps if args.max_steps > 0 else round(num_steps * args.num_train_epochs)
    return f"{line}, {num_rows} in all, {num_steps} steps an epoch, {steps} steps on one process", None


def _packing(name: str | None) -> tuple[str, None]:
    check_packing(unloaded_model(str(name)))
    return "samples share rows without padding", None


def _targets(examples: Sequence[Example], processor: Any, args: SFTConfig) -> tuple[str, TargetRows]:
    assert not isinstance(args.chat_template_kwargs, str)
    rows = TargetRows(
        examples,
        processor,
        max_length=args.max_length,
        filter_overlong=args.filter_overlong_rows,
        template_kwargs=args.chat_template_kwargs,
    )
    mean = sum(rows.lengths) / len(rows)
    return f"{len(rows)} rows, {mean:.0f} tokens on average, {max(rows.lengths)} at most", rows


def _prompts(examples: Sequence[Example], processor: Any, model: str | None, train: GRPOConfig) -> tuple[str, None]:
    context = context_of(str(model), train)
    longest = longest_prompt(examples, processor, context, train)
    return f"longest {longest} tokens, with {train.max_completion_length} to write, of {context}", None


def _rewards(
    examples: Sequence[Example] | None, processor: Any, reward_funcs: Sequence[str], train: GRPOConfig
) -> tuple[str, None]:
    stage = RewardStage(list(reward_funcs), train)
    if examples is None:
        return f"{', '.join(function.name for function in stage.functions)} found, not tried without rows", None
    results = try_rewards(stage, examples, processor, train)
    lines = [
        f"{name} {_mean(gold)} on gold answers, {_mean(empty)} on empty ones" for name, (gold, empty) in results.items()
    ]
    return "; ".join(lines), None


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "none"
