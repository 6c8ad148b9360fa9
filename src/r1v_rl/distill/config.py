"""The recipe of `r1v-rl distill`: model, scores, length, generation, judge and teacher, budget, export."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from r1v_rl.config import DataConfig, HeldoutConfig, build_configs
from r1v_rl.distill import prompts
from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import convert
from r1v_rl.rollout.engine import Sampling
from r1v_rl.scoring.chat_model import ChatModel
from r1v_rl.scoring.judge_config import JudgeConfig
from r1v_rl.scoring.rules import RewardSettings

_REWARDS = RewardSettings()
_JSON_KEYS = ("judge_kwargs", "reviser_kwargs", "generator_kwargs", "generation_kwargs", "serve_kwargs")


@dataclass
class DistillConfig(JudgeConfig):
    """What is distilled, by whom, and what it may cost; rows are named by the data keys."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder of the model that writes the chains, and that is to be trained on them."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the data set, its card and its report."})
    assessment: str = field(
        default="judge",
        metadata={
            "help": "Who scores text and integration: the judge by a rubric, or rules alone (no text score then).",
            "choices": ["judge", "rules"],
        },
    )
    assess_prompt: str = field(
        default=prompts.ASSESSMENT, metadata={"help": "The rubric, with {question}, {answer}, {any column}."}
    )
    json_schema: bool = field(
        default=True, metadata={"help": "Ask for replies by a JSON schema; false = by the words of the prompt alone."}
    )
    num_rereads: int = field(
        default=2, metadata={"help": "How often a reply that cannot be read is asked for again, before: unscored."}
    )
    ablation: bool = field(
        default=True,
        metadata={"help": "Ask the model with and without the pictures, to see whether the question needs them."},
    )
    necessity_by: str = field(
        default="model",
        metadata={
            "help": "What the ablation goes by: the model's answers, or rules on pixels and words, which ask nobody.",
            "choices": ["model", "rules"],
        },
    )
    alpha: float = field(
        default=math.log(2), metadata={"help": "Of the penalty min(2, e^(alpha (1 - score))); 0 = no penalty."}
    )
    beta: float = field(default=1.0, metadata={"help": "Weight of the text score; the vision score's is 1."})
    gamma: float = field(default=1.0, metadata={"help": "Weight of the integration score."})
    token_budget: list[int] | None = field(
        default=None,
        metadata={"help": "Most tokens of a chain at score 0 and at score 1, such as [256, 8192]; unset = no budget."},
    )
    generator_model: str | None = field(
        default=None, metadata={"help": "Name of a model at an endpoint that writes the chains; unset = the model."}
    )
    generator_base_url: str | None = field(default=None, metadata={"help": "Its OpenAI-compatible endpoint."})
    generator_api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Variable with its key."})
    generator_kwargs: dict | str | None = field(default=None, metadata={"help": "Arguments of its requests."})
    num_generations: int = field(default=4, metadata={"help": "Chains a row; the shortest right one is kept."})
    max_completion_length: int = field(default=8192, metadata={"help": "Most tokens of a chain."})
    temperature: float = field(default=0.6, metadata={"help": "Of the chains; 0 = greedy, one chain a row."})
    top_p: float = field(default=0.95, metadata={"help": "Of the chains."})
    top_k: int = field(default=0, metadata={"help": "0 keeps every token."})
    generation_batch_size: int = field(
        default=256, metadata={"help": "Rows answered at once: what a crash loses at most."}
    )
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the engine's own sampling."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template."}
    )
    use_vllm: bool = field(default=True, metadata={"help": "vLLM in this process; false = transformers' generate."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Weights and arithmetic.", "choices": ["float32", "bfloat16", "float16"]},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of a GPU's memory; leave room for what `serve_model` serves."}
    )
    vllm_kv_cache_memory_bytes: int | None = field(default=None, metadata={"help": "KV cache in bytes."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that the model is spread over."})
    answer_kind: str = field(
        default=_REWARDS.answer_kind, metadata={"help": "How answers are judged: math, number, choice, text."}
    )
    reward_timeout_s: float = field(
        default=_REWARDS.reward_timeout_s, metadata={"help": "Seconds after which judging one answer is given up."}
    )
    max_repeated: float = field(
        default=0.5, metadata={"help": "A chain of which a larger share repeats itself (8 words) is degenerate."}
    )
    num_revisions: int = field(default=2, metadata={"help": "Tries of the reviser at a row without a right chain."})
    budget_calls: int | None = field(default=None, metadata={"help": "Most requests to chat models, retries too."})
    budget_tokens: int | None = field(default=None, metadata={"help": "Most tokens in and out."})
    budget_usd: float | None = field(default=None, metadata={"help": "Most dollars, at the prices below."})
    judge_price: list[float] | None = field(
        default=None, metadata={"help": "Dollars for a million tokens in and out, such as [2.5, 10]."}
    )
    reviser_price: list[float] | None = field(default=None, metadata={"help": "The reviser's; unset = the judge's."})
    generator_price: list[float] | None = field(default=None, metadata={"help": "The generator's."})
    dry_run: bool = field(default=False, metadata={"help": "Print the number of calls and an estimate, ask nobody."})
    serve_model: str | None = field(
        default=None, metadata={"help": "Model that `vllm serve` serves for the run, as judge and reviser."}
    )
    serve_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of `vllm serve`, such as {max-model-len: 4096}."}
    )
    serve_timeout_s: float = field(default=1800.0, metadata={"help": "Seconds that the server may take to start."})
    duplicate_share: float = field(
        default=0.8,
        metadata={"help": "Rows with the same pictures, answer and so much of the text are duplicates; 0 = keep all."},
    )
    export_format: str = field(
        default="parquet", metadata={"help": "Of the data set.", "choices": ["parquet", "jsonl"]}
    )
    replies: str | None = field(
        default=None, metadata={"help": "File of what was asked and generated; unset = replies.jsonl in output_dir."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of rows that are made (`scenes`)."})

    _start: Callable[[], str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in (*_JSON_KEYS, "chat_template_kwargs"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, convert(value, dict))
        self._check_who()
        self._check_numbers()
        RewardSettings(answer_kind=self.answer_kind, reward_timeout_s=self.reward_timeout_s)

    def _check_who(self) -> None:
        for key in ("model_name_or_path", "output_dir"):
            if not getattr(self, key):
                raise RecipeError(f"the recipe must set `{key}`")
        if self.judge_model is None and (self.assessment == "judge" or self.answer_judge == "llm"):
            asker = "`assessment: judge`" if self.assessment == "judge" else "`answer_judge: llm`"
            raise RecipeError(f"{asker} needs `judge_model`, and its endpoint or `serve_model`")
        if self.serve_model is not None and (self.judge_base_url or self.reviser_base_url):
            raise RecipeError("`serve_model` is the judge's and the reviser's endpoint: leave their `_base_url` unset")
        if self.serve_model is not None and not (self.judge_model or self.reviser_model):
            raise RecipeError("`serve_model` serves a judge or a reviser: name one, `judge_model` or `reviser_model`")
        if self.necessity_by == "rules" and not self.ablation:
            raise RecipeError(
                "`ablation: false` leaves necessity out, so that `necessity_by` has no use: drop one of them"
            )
        if self.generator_base_url and not self.generator_model:
            raise RecipeError("`generator_base_url` needs `generator_model`: the model's name at that endpoint")

    def _check_numbers(self) -> None:
        least = {"num_rereads": 0, "num_generations": 1, "max_completion_length": 1, "generation_batch_size": 1}
        least |= {"num_revisions": 0, "alpha": 0, "beta": 0, "gamma": 0, "serve_timeout_s": 0}
        for key, lowest in least.items():
            if not getattr(self, key) >= lowest:
                raise RecipeError(f"`{key}` must be at least {lowest}, received {getattr(self, key)}")
        if self.num_generations > 1 and self.temperature <= 0:
            raise RecipeError(
                f"`temperature` 0 writes one chain a row, and the same every time; received "
                f"num_generations={self.num_generations}: set it to 1, or the temperature above 0"
            )
        budget = self.token_budget
        if budget is not None and (len(budget) != 2 or not 0 < budget[0] <= budget[1] <= self.max_completion_length):
            raise RecipeError(
                f"`token_budget` must be two rising numbers up to `max_completion_length` "
                f"({self.max_completion_length}), received {budget}"
            )
        for key in ("judge_price", "reviser_price", "generator_price"):
            if (price := getattr(self, key)) is not None and (len(price) != 2 or min(price) < 0):
                raise RecipeError(f"`{key}` must be dollars for a million tokens in and out, received {price}")
        if self.budget_usd is not None and not any((self.judge_price, self.reviser_price, self.generator_price)):
            raise RecipeError("`budget_usd` needs prices: `judge_price`, `reviser_price`, `generator_price`")

    def sampling(self) -> Sampling:
        """How chains are drawn, before each row's own penalty and budget."""
        assert not isinstance(self.generation_kwargs, str)
        return Sampling(
            num_generations=self.num_generations,
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p if self.temperature else 1.0,
            top_k=self.top_k,
            extra=self.generation_kwargs or {},
        )

    def generator(self) -> ChatModel | None:
        """The generator at an endpoint, where the recipe names one."""
        if self.generator_model is None:
            return None
        assert not isinstance(self.generator_kwargs, str)
        return ChatModel(
            model=self.generator_model,
            base_url=self.generator_base_url,
            api_key_env=self.generator_api_key_env,
            concurrency=self.judge_concurrency,
            timeout_s=self.judge_timeout_s,
            max_retries=self.judge_max_retries,
            parameters={"temperature": self.temperature, "top_p": self.top_p} | (self.generator_kwargs or {}),
            role="generator",
        )

    def prices(self) -> Mapping[str, tuple[float, float]]:
        """Model -> its price."""
        named = (
            (self.judge_model, self.judge_price),
            (self.reviser_model, self.reviser_price or self.judge_price),
            (self.generator_model, self.generator_price),
        )
        return {model: (price[0], price[1]) for model, price in named if model and price}

    def served_by(self, start: Callable[[], str]) -> "DistillConfig":
        """The recipe with judge and reviser at a server that `start` starts, the first time that one is asked."""
        served = replace(self)
        served._start = start
        return served

    def _chat_model(self, role: str, model: str, base_url: str | None, api_key_env: str) -> ChatModel:
        if self.serve_model is None:
            return super()._chat_model(role, model, base_url, api_key_env)
        return replace(super()._chat_model(role, model, "http://127.0.0.1/v1", api_key_env), start=self._start)


CONFIGS = (DistillConfig, DataConfig, HeldoutConfig)


@dataclass(frozen=True)
class Recipe:
    """A recipe of `distill` and the objects that its keys make."""

    values: dict[str, Any]
    distill: DistillConfig
    data: DataConfig
    heldout: HeldoutConfig
    """Evaluation rows: a row that is one of them, or nearly, is not distilled."""

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        kwargs = self.distill.chat_template_kwargs
        assert not isinstance(kwargs, str)
        return kwargs


def build_recipe(values: dict[str, Any]) -> Recipe:
    """The checked recipe.

    Raises:
        RecipeError: Naming the key that is missing or in conflict.
    """
    distill, data, heldout = build_configs(CONFIGS, values)
    if not data.dataset_name:
        raise RecipeError("the recipe must set `dataset_name`: `scenes`, a file, a folder or a hub id")
    return Recipe(values, distill, data, heldout)
