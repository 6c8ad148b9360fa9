"""Scorers: worked answers -> whole numbers from 0 to 5, by a rule, a chat model with a rubric, or a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from r1v_rl.errors import RecipeError, RewardError
from r1v_rl.scoring import judging
from r1v_rl.scoring.judge_config import JudgeConfig, WorkedAnswer
from r1v_rl.scoring.judging import MAX_SCORE, read_score, whole_score
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.rules import RewardSettings

NUM_STEPS = MAX_SCORE
"""Boundaries between the scores 0 to 5."""
_RULE_BATCH = 256


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


def make_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that a recipe names.

    Raises:
        UserError: If it cannot be loaded.
    """
    if config.scorer == "rubric":
        return RubricScorer(config)
    if config.scorer == "reward_model":
        from r1v_rl.scoring.reward_model import RewardModelScorer  # torch

        return RewardModelScorer(config)
    return RuleScorer(config.scorer, config)


class RubricScorer:
    """A chat model reads each worked answer and gives it a grade by the recipe's rubric."""

    def __init__(self, config: ScorerConfig):
        judge = config.judge()
        assert judge is not None  # ScorerConfig requires it
        self._config, self._judge = config, judge

    def __call__(self, answers: Sequence[WorkedAnswer], store: ReplyStore) -> list[Score]:
        questions = self._config.questions(self._config.rubric, answers)
        scores = []
        for reply in self._judge.ask(questions, store, label="scoring"):
            value = None if reply.text is None else read_score(reply.text)
            problem = "" if value is not None else reply.error or f"no score in the reply {reply.text!r:.80}"
            scores.append(Score(value, problem))
        return scores


class RuleScorer:
    """A function of the user's, in the signature of a reward, that returns whole numbers from 0 to 5 or None."""

    def __init__(self, name: str, config: ScorerConfig):
        (self._function,) = load_rewards([name], RewardSettings(reward_env=config.reward_env))

    def __call__(self, answers: Sequence[WorkedAnswer], store: ReplyStore) -> list[Score]:
        scores: list[Score] = []
        with tqdm(total=len(answers), desc="scoring", disable=None) as bar:
            for start in range(0, len(answers), _RULE_BATCH):
                batch = answers[start : start + _RULE_BATCH]
                scores += self._scored(batch)
                bar.update(len(batch))
        return scores

    def _scored(self, batch: Sequence[WorkedAnswer]) -> list[Score]:
        names = dict.fromkeys(name for answer in batch for name in answer.example.columns if name != "completion")
        columns: dict[str, list[Any]] = {name: [a.example.columns.get(name) for a in batch] for name in names}
        columns |= {"id": [a.example.id for a in batch], "answer": [a.example.answer for a in batch]}
        values = self._function(
            prompts=[answer.example.messages for answer in batch],
            completions=[[{"role": "assistant", "content": answer.completion}] for answer in batch],
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        for answer, value in zip(batch, values, strict=True):
            if value is not None and whole_score(value) is None:
                raise RewardError(
                    f"scorer {self._function.name!r} must return whole numbers from 0 to {MAX_SCORE} or None; received "
                    f"{value} for row {answer.example.id}"
                )
        return [Score(whole_score(value), "" if value is not None else "the rule cannot judge it") for value in values]
