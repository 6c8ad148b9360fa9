"""`r1v-rl check`: everything about a GRPO recipe that can be known without loading weights or training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trl
from transformers import AutoConfig, TrainerState

from r1v_rl.config import DataConfig, parse_recipe
from r1v_rl.data.chat import check_prompt_lengths, load_processor, prompt_text
from r1v_rl.data.dataset import load_configured_examples
from r1v_rl.errors import RewardError, UserError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.main import CONFIGS, RunConfig
from r1v_rl.grpo.rewards import RewardStage, reward_arguments
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.types import Completion, Example, RolloutGroup

NUM_REWARD_ROWS = 64


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


def _data(data: DataConfig, train: GRPOConfig, split: str | None = None) -> tuple[str, Sequence[Example]]:
    examples = load_configured_examples(data, split=split, seed=train.seed)
    counts = [len(example.images) for example in examples]
    with_images = sum(map(bool, counts))
    return f"{len(counts)} rows, {with_images} with images, {max(counts)} images in one at most", examples


def _heldout(run: RunConfig, data: DataConfig, train: GRPOConfig) -> tuple[str, Sequence[Example]]:
    heldout = replace(
        data,
        dataset_name=run.eval_dataset_name,
        dataset_size=run.eval_dataset_size,
        dataset_kwargs=run.eval_dataset_kwargs,
    )
    return _data(heldout, train, split=run.eval_dataset_split)


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
    text_config = AutoConfig.from_pretrained(model.model_name_or_path).get_text_config()
    context = train.vllm_max_model_length or text_config.max_position_embeddings
    longest = check_prompt_lengths(
        examples,
        processor,
        max_model_len=context,
        max_completion_length=train.max_completion_length or 0,
        template_kwargs=train.chat_template_kwargs,
    )
    return f"longest {longest} tokens, with {train.max_completion_length} to write, of {context}", None


def _rewards(examples: Sequence[Example], processor: Any, run: RunConfig, train: GRPOConfig) -> tuple[str, None]:
    """Call every reward on well-formed gold answers and on empty ones, as the trainer would."""
    stage = RewardStage(run.reward_funcs, train)
    rows = examples[:: max(1, len(examples) // NUM_REWARD_ROWS)][:NUM_REWARD_ROWS]
    opened = processor is not None and prompt_opens_think(prompt_text(processor, rows[0], train.chat_template_kwargs))
    head = "" if opened else "<think>\n"
    groups = [
        RolloutGroup(
            row, [], [_completion(f"{head}This follows.\n</think>\n\n\\boxed{{{row.answer}}}"), _completion("")], 0
        )
        for row in rows
    ]
    arguments = reward_arguments(groups)
    ignore = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    lines = []
    for function in stage.functions:
        values = function(**arguments, **ignore)
        gold, empty = values[0::2], values[1::2]
        if function.name == "accuracy":
            _refuse_unreadable_gold(rows, gold, train.answer_kind)
        lines.append(f"{function.name} {_mean(gold)} on gold answers, {_mean(empty)} on empty ones")
    return "; ".join(lines), None


def _refuse_unreadable_gold(rows: Sequence[Example], gold_rewards: Sequence[float | None], answer_kind: str) -> None:
    for row, reward in zip(rows, gold_rewards, strict=True):
        if reward != 1.0:
            raise RewardError(
                f"row {row.id}: its own gold answer {row.answer!r} is rewarded with {reward}, so no completion can be "
                f"right; mend the answer or set `answer_kind` (now {answer_kind})"
            )


def _completion(text: str) -> Completion:
    return Completion(token_ids=[0], logprobs=[0.0], text=text, is_truncated=False)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "none"
