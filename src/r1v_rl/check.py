"""`r1v-rl check`: everything about a GRPO recipe that can be known without loading weights or training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trl

from r1v_rl.config import DataConfig, parse_recipe
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import heldout_examples, load_configured_examples
from r1v_rl.errors import UserError
from r1v_rl.grpo.config import GRPOConfig, RunConfig
from r1v_rl.grpo.main import CONFIGS
from r1v_rl.grpo.preflight import context_of, longest_prompt, try_rewards
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.types import Example


@dataclass
class Report:
    """One line for each thing looked at; a fault does not keep the rest from being looked at."""

    faults: list[str] = field(default_factory=list)

    def look(self, subject: str, find: Callable[[], tuple[str, Any]]) -> Any:
        """What `find` found, its line printed; None where a user's mistake was found instead."""
        try:
            line, found = find()
        except UserError as error:
            self.faults.append(f"{subject}: {error}")
            print(f"  {subject:<9} FAULT")
            return None
        print(f"  {subject:<9} {line}")
        return found


def main(argv: Sequence[str]) -> int:
    """0 where the recipe can run; raises `UserError` with every fault that was found."""
    run, train, data, model = parse_recipe(CONFIGS, argv, prog="r1v-rl check")
    report = Report()
    print(f"checking {data.dataset_name} with {model.model_name_or_path}")
    examples = report.look("data", lambda: _data(data, train))
    heldout = report.look("held-out", lambda: _heldout(run, data, train)) if run.eval_dataset_name else []
    processor = report.look("model", lambda: _processor(model, data))
    if examples is not None:
        report.look("batch", lambda: _batch(examples, train))
    if examples is not None and processor is not None:
        report.look("prompts", lambda: _prompts([*examples, *(heldout or [])], processor, model, train))
    if examples is not None:
        report.look("rewards", lambda: _rewards(examples, processor, run, train))
    if report.faults:
        raise UserError("\n".join([f"{len(report.faults)} fault(s)", *report.faults]))
    return 0


def _data(data: DataConfig, train: GRPOConfig) -> tuple[str, Sequence[Example]]:
    return _described(load_configured_examples(data, seed=train.seed))


def _described(examples: Sequence[Example]) -> tuple[str, Sequence[Example]]:
    counts = [len(example.images) for example in examples]
    with_images = sum(map(bool, counts))
    return f"{len(counts)} rows, {with_images} with images, {max(counts)} images in one at most", examples


def _heldout(run: RunConfig, data: DataConfig, train: GRPOConfig) -> tuple[str, Sequence[Example]]:
    return _described(heldout_examples(run, data, train.seed))


def _processor(model: trl.ModelConfig, data: DataConfig) -> tuple[str, Any]:
    processor = load_processor(model.model_name_or_path, data.max_image_tiles)
    return f"{type(processor).__name__} of {model.model_name_or_path}", processor


def _batch(examples: Sequence[Example], train: GRPOConfig) -> tuple[str, None]:
    assert train.generation_batch_size is not None and train.num_generations is not None
    num_prompts = train.generation_batch_size // train.num_generations
    sampler = PromptSampler(
        len(examples),
        prompts_per_generation=num_prompts,
        micro_steps_per_generation=1,
        shuffle=bool(train.shuffle_dataset),
        seed=train.seed,
    )
    line = f"{num_prompts} prompts x {train.num_generations} completions a rollout"
    return f"{line}, {sampler.generations_per_epoch} rollouts an epoch", None


def _prompts(
    examples: Sequence[Example], processor: Any, model: trl.ModelConfig, train: GRPOConfig
) -> tuple[str, None]:
    context = context_of(model.model_name_or_path, train)
    longest = longest_prompt(examples, processor, context, train)
    return f"longest {longest} tokens, with {train.max_completion_length} to write, of {context}", None


def _rewards(examples: Sequence[Example], processor: Any, run: RunConfig, train: GRPOConfig) -> tuple[str, None]:
    results = try_rewards(RewardStage(run.reward_funcs, train), examples, processor, train)
    lines = [
        f"{name} {_mean(gold)} on gold answers, {_mean(empty)} on empty ones" for name, (gold, empty) in results.items()
    ]
    return "; ".join(lines), None


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "none"
