"""Scorers: worked answers -> whole numbers from 0 to 5, by a rule, a chat model with a rubric, or a reward model."""

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from r1v_rl.errors import RewardError
from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.judging import MAX_SCORE, read_score, whole_score
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.rules import RewardSettings
from r1v_rl.scoring.scorer_config import Score, Scorer, ScorerConfig

_RULE_BATCH = 256


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
