"""The rewards that can be named in a recipe without a file, in TRL's signature: `accuracy`, `format`, and a list."""

import importlib
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.answers import Verdict
from r1v_rl.scoring.extraction import ANSWER_KINDS
from r1v_rl.scoring.format import DEFAULT_FORMAT_PATTERN, has_format, with_prompt_think
from r1v_rl.scoring.workers import DEFAULT_NUM_WORKERS, DEFAULT_TIMEOUT_S, check_timeout, reason_rates, shared_pool

Reward = Callable[..., list[float | None]]
"""A function in TRL's signature."""
GUARDED_STEPS = 50
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "label")
"""Names of the gold's column; the first that is present is taken."""


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """The recipe keys that the built-in rewards read."""

    answer_kind: str = "math"
    """`math`, `number`, `choice` or `text`; a dataset column `answer_kind` overrides it row by row."""
    format_pattern: str = DEFAULT_FORMAT_PATTERN
    """What `format` looks for with `re.search` in the completion, the prompt's `<think>` put back."""
    reward_timeout_s: float = DEFAULT_TIMEOUT_S
    """Deadline for judging one answer, or for one search of a pattern of one's own. A call of a reward function of
    one's own has as much time for each completion that it is given."""
    reward_workers: int = DEFAULT_NUM_WORKERS
    """Grader processes of this rank."""
    reward_failure: str = "abort"
    """What happens when a reward function of one's own fails: `abort` ends the run, `skip` leaves the rows without
    that reward."""
    reward_env: list[str] | None = None
    """Environment variables with secrets that reward functions of one's own are to see."""
    reward_failure_limit: float = 0.05
    """Share of answers over the last 50 steps that may time out or be left unjudged by `accuracy` before the run
    stops; 1 never stops it."""
    cosine_min_value_wrong: float = -1.0
    cosine_max_value_wrong: float = -0.5
    cosine_min_value_correct: float = 0.5
    cosine_max_value_correct: float = 1.0
    cosine_max_len: int = 1000
    repetition_n_grams: int = 3
    repetition_max_penalty: float = -1.0
    max_completion_len: int | None = None
    max_completion_length: int | None = None
    """TRL's limit of a completion, taken where `max_completion_len` is unset."""
    soft_punish_cache: int = 4096
    judge_model: str | None = None
    judge_base_url: str | None = None
    judge_api_key_env: str = "OPENAI_API_KEY"
    judge_kwargs: dict | str | None = None
    judge_timeout_s: float = 60.0
    judge_max_retries: int = 5
    reward_model: str | None = None
    reward_model_batch_size: int = 8
    reward_model_dtype: str = "float32"
    output_dir: str | None = None
    """Where the judge's replies are kept."""
    prompt_opens_think: bool | None = None
    """Whether the chat template opens `<think>` for the model. Set, a completion that never closes it has no answer;
    None infers it from each completion."""

    def __post_init__(self) -> None:
        if self.answer_kind not in ANSWER_KINDS:
            raise RewardError(f"answer_kind must be one of {', '.join(ANSWER_KINDS)}; received {self.answer_kind!r}")
        check_timeout(self.reward_timeout_s)
        if not isinstance(self.reward_workers, int) or self.reward_workers < 1:
            raise RewardError(f"reward_workers must be a whole number of at least 1; received {self.reward_workers!r}")
        if not 0 <= self.reward_failure_limit <= 1:
            raise RewardError(f"reward_failure_limit must lie between 0 and 1; received {self.reward_failure_limit!r}")
        if self.reward_failure not in ("abort", "skip"):
            raise RewardError(f"reward_failure must be abort or skip; received {self.reward_failure!r}")
        if not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in self.reward_env or ()):
            raise RewardError("reward_env must be a list of names of environment variables, never what they hold")
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            raise RewardError(
                f"format_pattern must be a regular expression; received {self.format_pattern!r}: {error}"
            ) from error


def per_completion(reward: Reward) -> Reward:
    """The same function, marked as one that judges each completion by itself (`RewardFunction.per_completion`)."""
    reward.per_completion = True  # type: ignore[attr-defined]
    return reward


def completion_text(completion: Any) -> str:
    """The text of one completion as TRL hands it over: a string, or the assistant's messages."""
    if isinstance(completion, str):
        return completion
    return "".join(_content_text(message["content"]) for message in completion)


def gold_column(columns: dict[str, Any]) -> str | None:
    """The name of the column with the gold answers, or None."""
    return next((name for name in ANSWER_COLUMNS if columns.get(name) is not None), None)


def judged(completions: Sequence[Any], settings: RewardSettings, columns: dict[str, Any], reward: str) -> list[Verdict]:
    """The judge's verdict on each completion against the gold of its row.

    Raises:
        RewardError: If there is no column with gold answers; `reward` names who needs it.
    """
    gold = gold_column(columns)
    if gold is None:
        raise RewardError(
            f"the {reward} reward needs a dataset column named {', '.join(ANSWER_COLUMNS[:-1])} or "
            f"{ANSWER_COLUMNS[-1]}; "
            f"received {', '.join(sorted(columns)) or 'none'}: rename the column, or take {reward} out of "
            "reward_funcs"
        )
    texts = [with_prompt_think(completion_text(item), settings.prompt_opens_think) for item in completions]
    kinds = [kind or settings.answer_kind for kind in columns.get("answer_kind") or [None] * len(texts)]
    return shared_pool(settings.reward_workers).judge_answers(
        texts, columns[gold], kinds, columns.get("choices"), settings.reward_timeout_s
    )


class FailureGuard:
    """Ends a run whose answers cannot be judged: a timeout or a missing verdict is not a wrong answer."""

    def __init__(self, limit: float, num_steps: int = GUARDED_STEPS):
        self._limit = limit
        self._steps: deque[tuple[int, int]] = deque(maxlen=num_steps)

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Count one step's verdicts.

        Raises:
            RewardError: If more than the limit failed over the last steps.
        """
        failed = [item for item in verdicts if item.correct is None or item.reason == "timeout"]
        self._steps.append((len(failed), len(verdicts)))
        num_failed, total = (sum(values) for values in zip(*self._steps, strict=True))
        if len(self._steps) == self._steps.maxlen and num_failed > self._limit * total:
            counts = Counter(item.reason for item in failed)
            raise RewardError(
                f"{num_failed} of the last {total} answers could not be judged ({num_failed / total:.1%}; of this step "
                f"{', '.join(f'{reason} {number}' for reason, number in counts.items()) or 'none'}): see "
                "`verdict` in the rollouts; mend the gold answers, or raise reward_timeout_s or reward_failure_limit"
            )


def accuracy_reward(settings: RewardSettings) -> Reward:
    """The reward 1.0 for a right final answer, 0.0 for any other, None where nobody can tell (`Verdict.correct`)."""

    guard = FailureGuard(settings.reward_failure_limit)

    def accuracy(
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        verdicts = judged(completions, settings, columns, "accuracy")
        if log_extra is not None:
            log_extra("parsed_answer", [item.answer for item in verdicts])
            log_extra("verdict", [item.reason for item in verdicts])
        if log_metric is not None:
            for name, rate in reason_rates(verdicts).items():
                log_metric(name, rate)
        guard.add(verdicts)
        return [None if item.correct is None else float(item.correct) for item in verdicts]

    return accuracy


def format_reward(settings: RewardSettings) -> Reward:
    """The reward 1.0 for a completion in the wanted format, else 0.0; None where a pattern of one's own timed out."""

    def format(completions: Sequence[Any], **_: Any) -> list[float | None]:
        opened, pattern = settings.prompt_opens_think, settings.format_pattern
        texts = [completion_text(item) for item in completions]
        if pattern == DEFAULT_FORMAT_PATTERN:
            return [float(has_format(text, pattern, opened)) for text in texts]
        found = shared_pool(settings.reward_workers).match(
            pattern, [with_prompt_think(text, opened) for text in texts], settings.reward_timeout_s
        )
        return [None if item is None else float(item) for item in found]

    return format


def _later(module: str, name: str) -> Callable[[RewardSettings], Reward]:
    """A reward whose module is imported when a recipe names it."""

    def make(settings: RewardSettings) -> Reward:
        return getattr(importlib.import_module(f"r1v_rl.scoring.{module}"), f"{name}_reward")(settings)

    return make


BUILT_IN: dict[str, Callable[[RewardSettings], Reward]] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    **{
        name: _later("shaping", name)
        for name in (
            "tag_count",
            "reasoning_steps",
            "cosine",
            "length",
            "repetition_penalty",
            "soft_overlong_punishment",
        )
    },
    "judge": _later("verifier", "judge"),
    "reward_model": _later("reward_model", "reward_model"),
}


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")
