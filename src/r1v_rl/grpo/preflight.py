"""What can be known of a run before it trains; `grpo` refuses a recipe with it, `check` reports it."""

from collections.abc import Sequence
from typing import Any

import trl
from transformers import AutoConfig, TrainerState
from trl.trainer.utils import disable_dropout_in_model

from r1v_rl.data.chat import check_prompt_lengths, prompt_text
from r1v_rl.errors import RewardError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.verdicts import column_names, reward_arguments
from r1v_rl.models.packing import why_not_packed
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.training.launch import unloaded_model
from r1v_rl.types import Completion, Example, RolloutGroup

NUM_REWARD_ROWS = 64


def context_of(model_name_or_path: str, args: GRPOConfig) -> int:
    """Tokens that the model, or the recipe's `vllm_max_model_length`, can hold."""
    text_config = AutoConfig.from_pretrained(model_name_or_path).get_text_config()
    return args.vllm_max_model_length or text_config.max_position_embeddings


def how_prompts_run(model: trl.ModelConfig, args: GRPOConfig) -> str:
    """Whether an update runs each prompt once a group or once a completion, and why; without the weights."""
    if not args.share_prefix:
        return "every prompt is run once a completion (`share_prefix: false`)"
    policy = unloaded_model(str(model.model_name_or_path))
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    reason = why_not_packed(policy)
    if reason is None and model.use_peft and model.lora_dropout:
        reason = f"dropout (`lora_dropout: {model.lora_dropout}`) must draw another mask for every completion"
    if reason:
        return f"every prompt is run once a completion, because {reason}"
    return "every prompt and its images are run once a group"


def longest_prompt(examples: Sequence[Example], processor: Any, context: int, args: GRPOConfig) -> int:
    """Tokens of the longest prompt, visual ones included.

    Raises:
        DataError: If a prompt and a completion of full length do not fit into the context.
    """
    return check_prompt_lengths(
        examples,
        processor,
        max_model_len=context,
        max_completion_length=args.max_completion_length or 0,
        template_kwargs=args.chat_template_kwargs,
    )


def try_rewards(
    stage: RewardStage, examples: Sequence[Example], processor: Any, args: GRPOConfig
) -> dict[str, tuple[list[float | None], list[float | None]]]:
    """Every reward called on well-formed gold answers and on empty ones: name -> (gold rewards, empty rewards).

    Raises:
        RewardError: If one fails, returns what no reward can be, or `accuracy` cannot accept a row's own gold answer.
    """
    rows = examples[:: max(1, len(examples) // NUM_REWARD_ROWS)][:NUM_REWARD_ROWS]
    opened = processor is not None and prompt_opens_think(prompt_text(processor, rows[0], args.chat_template_kwargs))
    head = "" if opened else "<think>\n"
    groups = [
        RolloutGroup(
            row, [], [_completion(f"{head}This follows.\n</think>\n\n\\boxed{{{row.answer}}}"), _completion("")], 0
        )
        for row in rows
    ]
    ignore = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    results = {}
    for function in stage.functions:
        values = function(**reward_arguments(groups, column_names(rows)), **ignore)
        results[function.name] = values[0::2], values[1::2]
        if function.name == "accuracy":
            _refuse_unreadable_gold(rows, values[0::2], args.answer_kind)
    return results


def _refuse_unreadable_gold(rows: Sequence[Example], gold_rewards: Sequence[float | None], answer_kind: str) -> None:
    for row, reward in zip(rows, gold_rewards, strict=True):
        if reward != 1.0:
            raise RewardError(
                f"row {row.id}: its own gold answer {row.answer!r} is rewarded with {reward}, so no completion can be "
                f"right; mend the answer or set `answer_kind` (now {answer_kind})"
            )


def _completion(text: str) -> Completion:
    return Completion(token_ids=[0], logprobs=[0.0], text=text, is_truncated=False)
