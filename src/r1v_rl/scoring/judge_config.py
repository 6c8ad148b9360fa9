"""The recipe keys of the chat models that judge answers and revise chains, and what they are asked with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from r1v_rl.recipe_values import convert
from r1v_rl.scoring import judging
from r1v_rl.scoring.chat_model import ChatModel, ChatQuestion
from r1v_rl.scoring.config import JudgeEndpointConfig
from r1v_rl.scoring.judging import fill, question_text
from r1v_rl.types import Example


@dataclass(frozen=True, slots=True)
class WorkedAnswer:
    """A question of the dataset with one answer to it."""

    example: Example
    completion: str
    """What follows the prompt."""
    response: str
    """The same with the `<think>` that the prompt opened."""


@dataclass
class JudgeConfig(JudgeEndpointConfig):
    """Who judges and revises worked answers."""

    judge_concurrency: int = field(default=16, metadata={"help": "Questions in flight at once, judge and reviser."})
    judge_timeout_s: float = field(default=120.0, metadata={"help": "Seconds after which a question is asked again."})
    judge_max_retries: int = field(default=5, metadata={"help": "How often, with growing pauses."})
    judge_images: bool = field(default=True, metadata={"help": "Show pictures to the judge and the reviser."})
    answer_judge: str = field(
        default="rules",
        metadata={
            "help": "Who says which answers are right: the rules alone, or the judge too where they do not agree.",
            "choices": ["rules", "llm"],
        },
    )
    reviser_model: str | None = field(
        default=None,
        metadata={"help": "Rewrites wrong chains; unset = iterate asks its model again, distill drops the row."},
    )
    reviser_base_url: str | None = field(default=None, metadata={"help": "Its endpoint; unset = the judge's."})
    reviser_api_key_env: str | None = field(default=None, metadata={"help": "Its key's variable; unset = the judge's."})
    reviser_kwargs: dict | str | None = field(default=None, metadata={"help": "Arguments of its requests."})
    reviser_prompt: str = field(
        default=judging.REVISION, metadata={"help": "Its text, with {question}, {answer}, {response}, {any column}."}
    )

    def __post_init__(self) -> None:
        for key in ("judge_kwargs", "reviser_kwargs"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, convert(value, dict))

    def judge(self) -> ChatModel | None:
        """The judge, where the recipe names one."""
        if self.judge_model is None:
            return None
        return self._chat_model("judge", self.judge_model, self.judge_base_url, self.judge_api_key_env)

    def reviser(self) -> ChatModel | None:
        """The model that rewrites wrong chains, where the recipe names one."""
        if self.reviser_model is None:
            return None
        url = self.reviser_base_url or self.judge_base_url
        return self._chat_model("reviser", self.reviser_model, url, self.reviser_api_key_env or self.judge_api_key_env)

    def _chat_model(self, role: str, model: str, base_url: str | None, api_key_env: str) -> ChatModel:
        return ChatModel(
            model=model,
            base_url=base_url,
            api_key_env=api_key_env,
            concurrency=self.judge_concurrency,
            timeout_s=self.judge_timeout_s,
            max_retries=self.judge_max_retries,
            parameters={"temperature": 0.0} if (given := getattr(self, f"{role}_kwargs")) is None else given,
            role=role,
        )

    def questions(self, template: str, answers: Sequence[WorkedAnswer]) -> list[ChatQuestion]:
        """The template filled for each answer, with its pictures where they are shown."""
        return [
            ChatQuestion(
                answer.example.id,
                fill(
                    template,
                    question=question_text(answer.example),
                    answer=answer.example.answer,
                    response=answer.response,
                    columns=answer.example.columns,
                ),
                answer.example.images if self.judge_images else (),
            )
            for answer in answers
        ]
