"""The recipe of `r1v-rl iterate`: rounds, generation, scorer, data, and every key of `sft` for the training in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from r1v_rl.config import DataConfig, HeldoutConfig, build_configs
from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import convert
from r1v_rl.rollout.engine import Sampling
from r1v_rl.scoring.judging import MAX_SCORE
from r1v_rl.scoring.rules import RewardSettings
from r1v_rl.scoring.scorer_config import ScorerConfig
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.main import SFT_CONFIGS

_REWARDS = RewardSettings()
SET_BY_ROUNDS = {
    "learning_rate": "`learning_rates` has one for each round",
    "resume_from_checkpoint": "a run that finds its own rounds in `output_dir` goes on with them",
}
"""Keys of `sft` that a round sets itself, each with what to write instead."""


@dataclass
class IterateConfig:
    """What the rounds are made of, beside scorer, data and training."""

    taus: list[int] = field(
        default_factory=lambda: [2, 3, 4, 5],
        metadata={"help": "Lowest score that a round trains on, one for each round; errors are added to it."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 2e-5, 2e-5, 2e-5], metadata={"help": "Learning rate of each round."}
    )
    use_vllm: bool = field(default=True, metadata={"help": "Answer with vLLM; false = transformers' generate."})
    max_completion_length: int = field(default=8192, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=0.6, metadata={"help": "Of the answer that is judged; 0 = greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Of the answer that is judged."})
    top_k: int = field(default=0, metadata={"help": "0 keeps every token."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 discourages repetition."})
    num_resamples: int = field(
        default=4,
        metadata={"help": "Further tries at a row that was answered wrongly, where no reviser is named; 0 = none."},
    )
    resample_temperature: float = field(default=1.0, metadata={"help": "Of those tries; top_p is 1 for them."})
    generation_batch_size: int = field(
        default=256, metadata={"help": "Rows answered and judged at once: what a crash loses at most."}
    )
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the engine's own sampling."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "Share of a GPU's memory; nothing else is on it while vLLM answers."}
    )
    vllm_kv_cache_memory_bytes: int | None = field(
        default=None, metadata={"help": "KV cache in bytes; unset = vLLM's own measure."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that the model is spread over."})
    answer_kind: str = field(
        default=_REWARDS.answer_kind, metadata={"help": "How answers are judged: math, number, choice, text."}
    )
    reward_timeout_s: float = field(
        default=_REWARDS.reward_timeout_s, metadata={"help": "Seconds after which judging one answer is given up."}
    )
    distill_recipe: str | None = field(
        default=None,
        metadata={"help": "Recipe of `r1v-rl distill` that makes each round's chains; rows and model are the round's."},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "File for `accelerate launch --config_file`, which then starts each round's training."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.generation_kwargs, str):
            self.generation_kwargs = convert(self.generation_kwargs, dict)
        if not self.taus or len(self.taus) != len(self.learning_rates):
            raise RecipeError(
                f"`taus` and `learning_rates` must have one entry for each round; received {len(self.taus)} and "
                f"{len(self.learning_rates)}"
            )
        if any(tau not in range(MAX_SCORE + 1) for tau in self.taus):
            raise RecipeError(f"`taus` must be whole numbers from 0 to {MAX_SCORE}, received {self.taus}")
        for key, least in (("num_resamples", 0), ("generation_batch_size", 1), ("max_completion_length", 1)):
            if getattr(self, key) < least:
                raise RecipeError(f"`{key}` must be at least {least}, received {getattr(self, key)}")
        if self.num_resamples and self.resample_temperature <= 0:
            raise RecipeError("`resample_temperature` must be above 0: the same try again is the same wrong answer")
        RewardSettings(answer_kind=self.answer_kind, reward_timeout_s=self.reward_timeout_s)

    def sampling(self) -> Sampling:
        """How the answer that is judged is drawn."""
        assert not isinstance(self.generation_kwargs, str)
        return Sampling(
            num_generations=1,
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p if self.temperature else 1.0,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            extra=self.generation_kwargs or {},
        )

    @property
    def num_rounds(self) -> int:
        return len(self.taus)


CONFIGS = (IterateConfig, ScorerConfig, *SFT_CONFIGS)


@dataclass(frozen=True)
class Recipe:
    """A recipe of `iterate` and the objects that its keys make."""

    values: dict[str, Any]
    iterate: IterateConfig
    scorers: ScorerConfig
    data: DataConfig
    heldout: HeldoutConfig
    training: SFTConfig

    @property
    def dtype(self) -> str:
        """What the model answers in."""
        return "bfloat16" if self.training.bf16 else "float32"

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        kwargs = self.training.chat_template_kwargs
        assert not isinstance(kwargs, str)
        return kwargs


def build_recipe(values: dict[str, Any]) -> Recipe:
    """The checked recipe.

    Raises:
        RecipeError: Naming the key that is missing, or that has no place in a recipe of rounds.
    """
    for key in ("model_name_or_path", "output_dir", "dataset_name"):
        if not values.get(key):
            raise RecipeError(f"the recipe must set `{key}`")
    for key, instead in SET_BY_ROUNDS.items():
        if key in values:
            raise RecipeError(f"`{key}` is set by each round: {instead}")
    configs = dict(zip(CONFIGS, build_configs(CONFIGS, values), strict=True))
    if configs[ModelConfig].use_peft:
        raise RecipeError("`use_peft` must be false: every round starts from whole weights; name parts in `trainable`")
    data, heldout = configs[DataConfig], configs[HeldoutConfig]
    if values.get("eval_strategy", "no") != "no" and (data.system_prompt or data.instruction):
        raise RecipeError(
            "a round's rows hold `system_prompt` and `instruction` already, and its held-out rows would not: leave out "
            "`eval_strategy`, or write both texts into the rows of both data sets"
        )
    return Recipe(values, configs[IterateConfig], configs[ScorerConfig], data, heldout, configs[SFTConfig])


def training_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that go to `sft` in every round: not those of the dataset, which the round replaces (it was
    compared with the test rows before the first one), nor held-out rows whose loss nobody asks for."""
    dropped = {f.name for f in fields(DataConfig)} - {"max_image_tiles"}
    if values.get("eval_strategy", "no") == "no":
        dropped |= {f.name for f in fields(HeldoutConfig)}
    known = {f.name for config in SFT_CONFIGS for f in fields(config) if f.init} - dropped
    return {key: value for key, value in values.items() if key in known}
