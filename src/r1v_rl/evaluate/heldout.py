"""One model on held-out rows: accuracy with its interval, with blank pictures, on text alone, lengths and format."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from transformers import AutoConfig

from r1v_rl.config import DataConfig, HeldoutConfig
from r1v_rl.data.chat import check_prompt_lengths, load_processor
from r1v_rl.data.dataset import heldout_examples
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.accuracy import Answered, accuracy, answer_prompts, blanked
from r1v_rl.evaluate.grounding import gold_logprobs, measure_grounding
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import encode_prompt
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.scoring.rules import BUILT_IN, RewardSettings
from r1v_rl.types import Example

_REWARDS = RewardSettings()


@dataclass
class EvaluationConfig(HeldoutConfig):
    """Which model answers which rows, and how."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of the model."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for evaluation.json and evaluation.jsonl; unset = the model's own."}
    )
    blank_images: bool = field(
        default=True, metadata={"help": "Answer the rows once more with grey pictures: what is right then is guessed."}
    )
    grounding: bool = field(
        default=False,
        metadata={
            "help": "Ask about the rows with pictures again with grey ones, with another row's, and without any: gaps "
            "in accuracy and in the log-probability of the gold answer, each with its interval."
        },
    )
    text_dataset_name: str | None = field(
        default=None, metadata={"help": "Rows without pictures, whose accuracy is reported by itself."}
    )
    text_dataset_split: str = field(default="heldout", metadata={"help": "Their split."})
    text_dataset_size: int | None = field(default=None, metadata={"help": "Rows to take of them; unset = all."})
    text_dataset_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `scenes`, such as {num_images: 0}."}
    )
    num_generations: int = field(
        default=1, metadata={"help": "Answers a row; the accuracy is the mean over them (pass@1)."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "0 = the most likely token, one answer a row."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling, where the temperature is above 0."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 repeats less."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Prompts at once; vLLM batches by itself."})
    answer_kind: str = field(
        default=_REWARDS.answer_kind, metadata={"help": "How answers are judged: math, number, choice, text."}
    )
    format_pattern: str = field(
        default=_REWARDS.format_pattern, metadata={"help": "Regular expression of a well-formed completion."}
    )
    reward_timeout_s: float = field(
        default=_REWARDS.reward_timeout_s, metadata={"help": "Seconds after which judging one answer is given up."}
    )
    use_vllm: bool = field(default=True, metadata={"help": "vLLM in this process; false = transformers' `generate`."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Weights and arithmetic.", "choices": ["float32", "bfloat16", "float16"]},
    )
    vllm_kv_cache_memory_bytes: int | None = field(
        default=None, metadata={"help": "KV cache of vLLM in bytes; unset = vLLM's own measure."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of each GPU's memory; nothing else is on it."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that the model is spread over."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of rows that are made (`scenes`)."})

    def __post_init__(self) -> None:
        if self.num_generations < 1 or (self.num_generations > 1 and self.temperature == 0.0):
            raise RecipeError(
                f"`num_generations` must be 1 where `temperature` is 0, and at least 1; received "
                f"num_generations={self.num_generations}, temperature={self.temperature}"
            )
        if self.eval_dataset_name is None:
            raise RecipeError("evaluate needs `eval_dataset_name`: `scenes`, a file, a folder or a hub id")

    def sampling(self) -> Sampling:
        return Sampling(
            num_generations=self.num_generations,
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    def rewards(self) -> RewardSettings:
        return RewardSettings(self.answer_kind, self.format_pattern, self.reward_timeout_s)


def evaluate_model(config: EvaluationConfig, data: DataConfig) -> tuple[dict, list[dict]]:
    """What the model reached, and every answer that it gave (`set id completion answer correct num_tokens`).

    Raises:
        DataError: If a row is faulty or does not fit into the model's context.
    """
    model = str(config.model_name_or_path)
    processor = load_processor(model, data.max_image_tiles)
    rows = heldout_examples(config, data, config.seed)
    text_rows = heldout_examples(text_rows_of(config), data, config.seed)
    longest = longest_prompt(config, processor, [*rows, *text_rows])
    sets = {"pictures": (rows, None)} | ({"blank": (rows, blanked)} if config.blank_images else {})
    sets |= {"text": (text_rows, None)} if text_rows else {}
    found: dict[str, Any] = {"num_rows": len(rows), "num_generations": config.num_generations}
    encode = partial(encode_prompt, processor, device="cpu")
    answered: dict[str, list[Answered]] = {}
    with standalone_engine(
        model,
        processor,
        use_vllm=config.use_vllm,
        dtype=config.dtype,
        max_model_len=longest + config.max_completion_length,
        max_images=max(len(example.images) for example in rows),
        seed=config.seed,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_memory_bytes=config.vllm_kv_cache_memory_bytes,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
    ) as engine:
        for name, (examples, change) in sets.items():
            answered[name] = _answers(engine, processor, config, examples, change)
            found |= _measures(name, answered[name], processor, config.rewards())
        if config.grounding:
            found["grounding"] = measure_grounding(
                rows,
                answered,
                answer=lambda examples: _answers(engine, processor, config, examples, None),
                logprobs=lambda examples: gold_logprobs(engine, [encode(e) for e in examples], processor),
                seed=config.seed,
            )
        answers = [_answer_row(name, row) for name in answered for row in answered[name]]
    return found, answers


def longest_prompt(config: EvaluationConfig, processor: Any, examples: Sequence[Example]) -> int:
    """Tokens of the longest prompt; refuses the first row that does not fit into the model's context."""
    text_config = AutoConfig.from_pretrained(str(config.model_name_or_path)).get_text_config()
    return check_prompt_lengths(
        examples,
        processor,
        max_model_len=text_config.max_position_embeddings,
        max_completion_length=config.max_completion_length,
    )


def text_rows_of(config: EvaluationConfig) -> HeldoutConfig:
    """The text-only set as `heldout_examples` takes it."""
    return HeldoutConfig(
        config.text_dataset_name, config.text_dataset_split, config.text_dataset_size, config.text_dataset_kwargs
    )


def _answers(
    engine: RolloutEngine,
    processor: Any,
    config: EvaluationConfig,
    examples: Sequence[Example],
    change: Callable[[Example], Example] | None,
) -> list[Answered]:
    answered: list[Answered] = []
    size = config.per_device_eval_batch_size
    for start in range(0, len(examples), size):
        chunk = [change(example) if change else example for example in examples[start : start + size]]
        answered += answer_prompts(
            engine,
            [encode_prompt(processor, example, device="cpu") for example in chunk],
            config.sampling(),
            answer_kind=config.answer_kind,
            timeout_s=config.reward_timeout_s,
            seed=config.seed + start,
        )
    return answered


def _measures(name: str, answered: Sequence[Answered], processor: Any, rewards: RewardSettings) -> dict[str, Any]:
    """Accuracy of any set; lengths and format of the one with pictures."""
    share = asdict(accuracy(answered))
    if name != "pictures":
        return {f"{name}_accuracy": share}
    lengths = [len(row.completion.token_ids) for row in answered]
    return {
        "accuracy": share,
        "mean_length": sum(lengths) / len(lengths),
        "truncated_frac": sum(row.completion.is_truncated for row in answered) / len(answered),
        "unjudged_frac": sum(row.verdict.correct is None for row in answered) / len(answered),
        "format_rate": _format_rate(answered, processor, rewards),
    }


def _format_rate(answered: Sequence[Answered], processor: Any, rewards: RewardSettings) -> float:
    """Share of completions that the `format` reward would pay, the prompt's `<think>` put back."""
    messages = answered[0].example.messages
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    settings = replace(rewards, prompt_opens_think=prompt_opens_think(text))
    values = BUILT_IN["format"](settings)(completions=[row.completion.text for row in answered])
    return sum(value == 1.0 for value in values) / len(values)


def _answer_row(name: str, row: Answered) -> dict[str, Any]:
    return {
        "set": name,
        "id": row.example.id,
        "completion": row.completion.text,
        "num_tokens": len(row.completion.token_ids),
        "answer": row.verdict.answer,
        "gold": row.example.answer,
        "correct": row.verdict.correct,
        "reason": row.verdict.reason,
    }


def answer_lines(answers: Sequence[dict]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers).encode()
