"""The recipe keys of the judge, and of the rewards that are named without a file."""

from dataclasses import dataclass, field

from r1v_rl.scoring.rules import RewardSettings

_DEFAULT = RewardSettings()


@dataclass
class JudgeEndpointConfig:
    """Which chat model is the judge, where it is, and what its requests say."""

    judge_model: str | None = field(default=None, metadata={"help": "Name of the judge at its endpoint."})
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Its OpenAI-compatible endpoint, http://host:port/v1; unset = OpenAI's."}
    )
    judge_api_key_env: str = field(
        default=_DEFAULT.judge_api_key_env, metadata={"help": "Environment variable that holds its key."}
    )
    judge_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of its requests, such as {temperature: 0}, which is the default."}
    )


@dataclass
class NamedRewardConfig(JudgeEndpointConfig):
    """Keys of reward functions of one's own, of `cosine`, `repetition_penalty` and `soft_overlong_punishment`
    (open-r1's), `judge` and `reward_model`."""

    reward_env: list[str] | None = field(
        default=None,
        metadata={"help": "Variables named like secrets (MY_API_KEY) that your reward functions see; unset = none."},
    )
    cosine_min_value_wrong: float = field(
        default=_DEFAULT.cosine_min_value_wrong, metadata={"help": "cosine: a wrong answer at length 0."}
    )
    cosine_max_value_wrong: float = field(
        default=_DEFAULT.cosine_max_value_wrong, metadata={"help": "cosine: a wrong answer at full length."}
    )
    cosine_min_value_correct: float = field(
        default=_DEFAULT.cosine_min_value_correct, metadata={"help": "cosine: a right answer at full length."}
    )
    cosine_max_value_correct: float = field(
        default=_DEFAULT.cosine_max_value_correct, metadata={"help": "cosine: a right answer at length 0."}
    )
    cosine_max_len: int = field(default=_DEFAULT.cosine_max_len, metadata={"help": "cosine: full length, in tokens."})
    repetition_n_grams: int = field(
        default=_DEFAULT.repetition_n_grams, metadata={"help": "repetition_penalty: tokens of an n-gram."}
    )
    repetition_max_penalty: float = field(
        default=_DEFAULT.repetition_max_penalty, metadata={"help": "repetition_penalty: reward of nothing new."}
    )
    max_completion_len: int | None = field(
        default=None,
        metadata={"help": "soft_overlong_punishment: the length punished whole; unset = max_completion_length."},
    )
    soft_punish_cache: int = field(
        default=_DEFAULT.soft_punish_cache,
        metadata={"help": "soft_overlong_punishment: tokens before that over which the punishment grows."},
    )
    judge_timeout_s: float = field(
        default=_DEFAULT.judge_timeout_s, metadata={"help": "judge: seconds after which a question is asked again."}
    )
    judge_max_retries: int = field(
        default=_DEFAULT.judge_max_retries, metadata={"help": "judge: how often, with growing pauses."}
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "reward_model: folder or hub id of a sequence classification model with one output."},
    )
    reward_model_batch_size: int = field(
        default=_DEFAULT.reward_model_batch_size, metadata={"help": "reward_model: completions it reads at once."}
    )
    reward_model_dtype: str = field(
        default=_DEFAULT.reward_model_dtype, metadata={"help": "reward_model: float32, bfloat16 or float16."}
    )
