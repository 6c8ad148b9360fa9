"""What scorers of worked answers are told (`ScorerConfig`) and what they say (`Score`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from r1v_rl.errors import RecipeError
from r1v_rl.scoring import judging
from r1v_rl.scoring.judge_config import JudgeConfig, WorkedAnswer
from r1v_rl.scoring.judging import MAX_SCORE
from r1v_rl.scoring.replies import ReplyStore

NUM_STEPS = MAX_SCORE
"""Boundaries between the scores 0 to 5."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer says of one worked answer."""

    value: int | None
    """0 to 5; None where it cannot judge."""
    problem: str = ""
    """Why it cannot."""


class Scorer(Protocol):
    """Scores worked answers, one `Score` each, in order."""

    def __call__(self, answers: Sequence[WorkedAnswer], store: ReplyStore) -> list[Score]: ...


@dataclass
class ScorerConfig(JudgeConfig):
    """Who scores, judges and revises worked answers."""

    scorer: str = field(
        default="rubric",
        metadata={"help": "What gives 0 to 5: rubric, reward_model, or a rule, path/file.py:function."},
    )
    rubric: str = field(
        default=judging.RUBRIC, metadata={"help": "The judge's text, with {question}, {answer}, {response}."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a sequence classification model with one output."}
    )
    reward_model_thresholds: list[float] | None = field(
        default=None, metadata={"help": "Five rising rewards from which on the score is 1, 2, 3, 4, 5."}
    )
    reward_model_quantiles: list[float] | None = field(
        default=None, metadata={"help": "Or five rising shares of a round's rewards, such as [.1, .3, .5, .7, .9]."}
    )
    reward_env: list[str] | None = field(
        default=None, metadata={"help": "Variables named like secrets (MY_API_KEY) that a rule sees; unset = none."}
    )
    reward_model_batch_size: int = field(default=8, metadata={"help": "Answers scored at once."})
    reward_model_dtype: str = field(default="float32", metadata={"help": "Its dtype: float32, bfloat16, float16."})

    def __post_init__(self) -> None:
        super().__post_init__()
        judging.check_template("reviser_prompt", self.reviser_prompt, ("question", "answer", "response"))
        judging.check_template("rubric", self.rubric, ("question", "response"))
        if self.judge_model is None and (self.scorer == "rubric" or self.answer_judge == "llm"):
            asker = "`scorer: rubric`" if self.scorer == "rubric" else "`answer_judge: llm`"
            raise RecipeError(f"{asker} needs `judge_model` (and `judge_base_url`, where it is not OpenAI's)")
        if self.scorer == "reward_model":
            if self.reward_model is None:
                raise RecipeError("`scorer: reward_model` needs `reward_model`: a model folder or a hub id")
            self._check_steps()

    def _check_steps(self) -> None:
        keys = [key for key in ("reward_model_thresholds", "reward_model_quantiles") if getattr(self, key) is not None]
        if len(keys) != 1:
            raise RecipeError(
                "set one of `reward_model_thresholds` and `reward_model_quantiles`: rewards have no scale"
            )
        steps = getattr(self, keys[0])
        if len(steps) != NUM_STEPS or sorted(set(steps)) != steps:
            raise RecipeError(f"`{keys[0]}` must be {NUM_STEPS} rising numbers, received {steps}")
        if keys[0] == "reward_model_quantiles" and not 0 <= steps[0] <= steps[-1] <= 1:
            raise RecipeError(f"`{keys[0]}` are shares between 0 and 1, received {steps}")
