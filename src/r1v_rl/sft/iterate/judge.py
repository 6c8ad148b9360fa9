"""Which answers are right: by the rules, and where the recipe says so by a chat model that compares final answers."""

from collections.abc import Sequence
from dataclasses import replace

from r1v_rl.scoring import Verdict, judge_answers
from r1v_rl.scoring.chat_model import ChatQuestion
from r1v_rl.scoring.format import with_prompt_think
from r1v_rl.scoring.judging import SAME_ANSWER, fill, question_text, read_same
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.sft.iterate.config import Recipe
from r1v_rl.types import Example


class AnswerJudge:
    """Judges completions against the rows' gold answers.

    The chat model is asked only about answers that the rules do not accept, and sees the final answer alone: a chain
    cannot talk to it. What it cannot judge stays as the rules have it.
    """

    def __init__(self, recipe: Recipe, store: ReplyStore):
        self._config, self._store = recipe.iterate, store
        self._judge = recipe.scorers.judge() if recipe.scorers.answer_judge == "llm" else None

    def __call__(
        self, examples: Sequence[Example], completions: Sequence[str], opens_think: Sequence[bool]
    ) -> tuple[list[Verdict], list[str]]:
        """One verdict a completion, and what kept the chat model from judging it ("" where nothing did).

        Args:
            opens_think: Whether the row's prompt ends inside an open `<think>`.
        """
        verdicts = judge_answers(
            [with_prompt_think(text, opened) for text, opened in zip(completions, opens_think, strict=True)],
            [example.answer for example in examples],
            [example.columns.get("answer_kind") or self._config.answer_kind for example in examples],
            [example.columns.get("choices") for example in examples],
            self._config.reward_timeout_s,
        )
        problems = [""] * len(verdicts)
        if self._judge is None:
            return verdicts, problems
        doubtful = [i for i, verdict in enumerate(verdicts) if verdict.correct is not True and verdict.answer]
        questions = [self._question(examples[i], verdicts[i].answer or "") for i in doubtful]
        for i, reply in zip(doubtful, self._judge.ask(questions, self._store, label="judging"), strict=True):
            same = None if reply.text is None else read_same(reply.text)
            if same is None:
                problems[i] = reply.error or f"neither yes nor no in the reply {reply.text!r:.80}"
            else:
                verdicts[i] = replace(verdicts[i], correct=same, reason="right" if same else "wrong")
        return verdicts, problems

    @staticmethod
    def _question(example: Example, answer: str) -> ChatQuestion:
        text = fill(SAME_ANSWER, question=question_text(example), answer=example.answer, response=answer)
        return ChatQuestion(example.id, text)
