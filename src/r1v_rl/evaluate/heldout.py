"""One model on held-out rows (with pictures, with blank ones, on text alone) or on benchmarks, and what it reached."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from r1v_rl.config import DataConfig, HeldoutConfig
from r1v_rl.data.chat import check_prompt_lengths, load_processor
from r1v_rl.data.dataset import heldout_examples
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.accuracy import accuracy_of, blanked
from r1v_rl.evaluate.answering import AnswerFile, Asking, RowSet, answer_sets
from r1v_rl.evaluate.benchmark_config import BenchmarkConfig
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.benchmarks.base import load_benchmark
from r1v_rl.evaluate.grounding import control_rows, gold_logprobs, grounding_measures
from r1v_rl.evaluate.llm_judge import judge_unread
from r1v_rl.evaluate.measures import benchmark_measures, right_by_id
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import encode_prompt
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.rules import BUILT_IN, RewardSettings
from r1v_rl.types import Example

HELDOUT_SAMPLING = {"num_generations": 1, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
HELDOUT_TOKENS = 256
R1V_SAMPLING = {"num_generations": 5, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
R1V_TOKENS = 64000
"""The Skywork R1V report's five runs, and its release's sampling."""
JUDGE_REPLIES = "evaluation.judge.jsonl"

_REWARDS = RewardSettings()


@dataclass
class EvaluationConfig(BenchmarkConfig, HeldoutConfig):
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
    num_generations: int | None = field(
        default=None,
        metadata={"help": "Answers a row; the accuracy is the mean over them (pass@1). Unset: 1, benchmarks 5."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of an answer. Unset: 256, benchmarks 64000 or what the context has room for."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "0 = the most likely token, one answer a row. Unset: 0, benchmarks 0.6."}
    )
    top_p: float | None = field(default=None, metadata={"help": "Nucleus sampling. Unset: 1, benchmarks 0.95."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Above 1 repeats less. Unset: 1, benchmarks 1.05."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows at once, kept whole or not at all; unset = 512 answers with vLLM, 64 rows without."},
    )
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
        if (self.eval_dataset_name is None) == (not self.benchmarks):
            raise RecipeError(
                "evaluate needs `eval_dataset_name` (`scenes`, a file, a folder or a hub id) or `benchmarks`, and not "
                f"both; received {self.eval_dataset_name!r} and {self.benchmarks!r}"
            )
        self.check_benchmarks()
        if self.greedy and (self.temperature or (self.num_generations or 1) > 1):
            raise RecipeError("`greedy` is `temperature: 0` and one answer a row; leave out one of them")
        for key, value in (HELDOUT_SAMPLING if self.greedy or not self.benchmarks else R1V_SAMPLING).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if self.temperature == 0.0 and self.benchmarks and self.num_generations == R1V_SAMPLING["num_generations"]:
            self.num_generations = 1
        assert self.num_generations is not None
        if self.num_generations < 1 or (self.num_generations > 1 and self.temperature == 0.0):
            raise RecipeError(
                f"`num_generations` must be 1 where `temperature` is 0, and at least 1; received "
                f"num_generations={self.num_generations}, temperature={self.temperature}"
            )
        if self.grounding and self.benchmarks:
            raise RecipeError(
                "`grounding` is measured on held-out rows: take `benchmarks` out, and name a file of rows"
            )
        if self.max_completion_length is None and not self.benchmarks:
            self.max_completion_length = HELDOUT_TOKENS

    @property
    def chunk_size(self) -> int:
        """Rows that are answered together."""
        assert self.num_generations is not None
        return self.per_device_eval_batch_size or (max(1, 512 // self.num_generations) if self.use_vllm else 64)

    def sampling(self, max_tokens: int | None = None) -> Sampling:
        """How answers are drawn; `max_tokens` where the recipe does not say."""
        tokens = self.max_completion_length or max_tokens
        assert self.num_generations is not None and tokens is not None and self.temperature is not None
        assert self.top_p is not None and self.repetition_penalty is not None
        return Sampling(
            num_generations=self.num_generations,
            max_tokens=tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    def rewards(self) -> RewardSettings:
        return RewardSettings(self.answer_kind, self.format_pattern, self.reward_timeout_s)


def evaluate_model(
    config: EvaluationConfig, data: DataConfig, answers: AnswerFile | None = None
) -> tuple[dict, list[dict]]:
    """What the model reached, and every answer that it gave, one row each as `evaluation.jsonl` has them.

    Args:
        answers: Those of an earlier run, gone on with; None starts anew and keeps them in memory.

    Raises:
        DataError: If a row is faulty or does not fit into the model's context.
    """
    answers = AnswerFile(None) if answers is None else answers
    processor = load_processor(str(config.model_name_or_path), data.max_image_tiles)
    sets, max_model_len = row_sets(config, data, processor)
    with (
        ExitStack() as stack,
        ReplyStore(Path(config.output_dir or str(config.model_name_or_path), JUDGE_REPLIES))
        if (config.judge() is not None)
        else nullcontext() as store,
    ):

        @cache
        def engine() -> RolloutEngine:
            return stack.enter_context(_engine(config, processor, max_model_len, most_images(sets)))

        judge = config.judge()
        asking = Asking(
            processor,
            config.answer_kind,
            config.reward_timeout_s,
            config.seed,
            config.chunk_size,
            with_vision_inputs=not config.use_vllm,
            judge=partial(judge_unread, judge, store) if judge is not None and store is not None else None,
        )
        spent = answer_sets(sets, asking, answers, lambda: nullcontext(engine()))
        by_set = {rows.name: [row for row in answers.rows if row["set"] == rows.name] for rows in sets}
        grounding = _grounding(config, processor, sets, by_set, engine) if config.grounding else {}
    found: dict[str, Any] = {"num_rows": len(sets[0].examples), "num_generations": config.num_generations}
    if config.benchmarks:
        found = {"benchmarks": {rows.name: benchmark_measures(rows, by_set[rows.name], config.seed) for rows in sets}}
        found["tokens_per_s"] = round(spent["tokens"] / spent["seconds"], 1) if spent["seconds"] else None
    else:
        for name, rows in by_set.items():
            found |= _measures(name, rows, sets[0].examples[0], processor, config.rewards())
        found |= grounding
    return found, answers.rows


def row_sets(config: EvaluationConfig, data: DataConfig, processor: Any) -> tuple[list[RowSet], int]:
    """What is asked, and the longest prompt with its answer in tokens.

    Raises:
        DataError: If a row is faulty or does not fit into the model's context.
    """
    if config.benchmarks:
        return benchmark_sets(config, data, processor)
    rows = heldout_examples(config, data, config.seed)
    text_rows = heldout_examples(text_rows_of(config), data, config.seed)
    controls = control_rows(rows, seed=config.seed) if config.grounding else {}
    longest = longest_prompt(config, processor, [*rows, *text_rows, *controls.get("shuffled", ())])
    sampling = config.sampling()
    sets = [RowSet("pictures", rows, sampling)]
    sets += [RowSet("blank", rows, sampling, blanked)] if config.blank_images or config.grounding else []
    sets += [RowSet(name, controls[name], sampling) for name in controls if name not in ("pictures", "blank")]
    sets += [RowSet("text", text_rows, sampling)] if text_rows else []
    return sets, longest + sampling.most_tokens


def _grounding(
    config: EvaluationConfig,
    processor: Any,
    sets: Sequence[RowSet],
    by_set: Mapping[str, Sequence[dict]],
    engine: Callable[[], RolloutEngine],
) -> dict[str, Any]:
    """The gaps between the answers with pictures and the controls', and those of the gold answers' log-probability."""
    size = config.chunk_size
    logprobs: dict[str, dict[str, float]] = {}
    for name, rows in control_rows(sets[0].examples, seed=config.seed).items():
        logprobs[name] = {}
        for start in range(0, len(rows), size):
            prompts = [encode_prompt(processor, example, device="cpu") for example in rows[start : start + size]]
            logprobs[name] |= gold_logprobs(engine(), prompts, processor)
    right = {name: right_by_id(by_set[name]) for name in logprobs}
    return {"grounding": grounding_measures(right, logprobs, config.seed)}


def benchmark_sets(config: EvaluationConfig, data: DataConfig, processor: Any) -> tuple[list[RowSet], int]:
    """A set for each benchmark; where the recipe names no length of answers, the paper's or what the context allows."""
    context = context_of(str(config.model_name_or_path))
    sets, longest_row = [], 0
    for name, examples in benchmark_examples(config, data).items():
        longest = longest_prompt(config, processor, examples)
        sampling = config.sampling(min(R1V_TOKENS, context - longest))
        sets.append(RowSet(name, examples, sampling))
        longest_row = max(longest_row, longest + sampling.most_tokens)
    return sets, longest_row


def benchmark_examples(config: EvaluationConfig, data: DataConfig) -> dict[str, list[Example]]:
    """The rows of every benchmark that the recipe names.

    Raises:
        DataError: If one is not there, or a row of it is faulty.
    """
    assert not isinstance(config.benchmark_paths, str)
    return {
        name: load_benchmark(
            BENCHMARKS[name],
            config.instructions(),
            root=config.benchmark_root,
            path=(config.benchmark_paths or {}).get(name),
            size=config.benchmark_size,
            seed=config.seed,
            system_prompt=data.system_prompt,
        )
        for name in config.benchmarks or ()
    }


def most_images(sets: Sequence[RowSet]) -> int:
    """Images of the row that has most."""
    return max(len(example.images) for rows in sets for example in rows.examples)


def context_of(model: str) -> int:
    """Tokens that a model can hold, by its configuration."""
    return AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings


def longest_prompt(config: EvaluationConfig, processor: Any, examples: Sequence[Example]) -> int:
    """Tokens of the longest prompt; refuses the first row that does not fit into the model's context."""
    return check_prompt_lengths(
        examples,
        processor,
        max_model_len=context_of(str(config.model_name_or_path)),
        max_completion_length=config.max_completion_length or 1,
    )


def text_rows_of(config: EvaluationConfig) -> HeldoutConfig:
    """The text-only set as `heldout_examples` takes it."""
    return HeldoutConfig(
        config.text_dataset_name, config.text_dataset_split, config.text_dataset_size, config.text_dataset_kwargs
    )


def _engine(
    config: EvaluationConfig, processor: Any, max_model_len: int, max_images: int
) -> AbstractContextManager[RolloutEngine]:
    return standalone_engine(
        str(config.model_name_or_path),
        processor,
        use_vllm=config.use_vllm,
        dtype=config.dtype,
        max_model_len=max_model_len,
        max_images=max_images,
        seed=config.seed,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_memory_bytes=config.vllm_kv_cache_memory_bytes,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
    )


def _measures(
    name: str, rows: Sequence[dict], example: Example, processor: Any, rewards: RewardSettings
) -> dict[str, Any]:
    """Accuracy of any set; lengths and format of the one with pictures."""
    share = asdict(accuracy_of(right_by_id(rows)))
    if name != "pictures":
        return {f"{name}_accuracy": share}
    return {
        "accuracy": share,
        "mean_length": sum(row["num_tokens"] for row in rows) / len(rows),
        "truncated_frac": sum(row["truncated"] for row in rows) / len(rows),
        "unjudged_frac": sum(row["correct"] is None for row in rows) / len(rows),
        "format_rate": _format_rate([row["completion"] for row in rows], example, processor, rewards),
    }


def _format_rate(completions: Sequence[str], example: Example, processor: Any, rewards: RewardSettings) -> float:
    """Share of completions that the `format` reward would pay, the prompt's `<think>` put back."""
    text = processor.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)
    settings = replace(rewards, prompt_opens_think=prompt_opens_think(text))
    values = BUILT_IN["format"](settings)(completions=list(completions))
    return sum(value == 1.0 for value in values) / len(values)
