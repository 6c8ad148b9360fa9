"""A chat model that says whether an answer agrees with the gold one, asked where the rules cannot read the answer."""

from collections.abc import Sequence
from dataclasses import replace

from r1v_rl.evaluate.accuracy import Answered
from r1v_rl.scoring.chat_model import ChatModel, ChatQuestion
from r1v_rl.scoring.extraction import answer_part
from r1v_rl.scoring.judging import SAME_ANSWER, fill, question_text, read_same
from r1v_rl.scoring.replies import ReplyStore

MAX_CHARS = 2000
"""The end of a response that the judge is shown; what was thought is not."""


def judge_unread(judge: ChatModel, store: ReplyStore, answered: Sequence[Answered]) -> list[Answered]:
    """The same answers, those that the rules could not read with the judge's verdict; what it cannot say stays.

    Raises:
        UserError: If the judge refuses or is out of reach.
    """
    found = list(answered)
    asked = [i for i, row in enumerate(found) if is_unread(row)]
    questions = [_question(found[i]) for i in asked]
    for i, reply in zip(asked, judge.ask(questions, store, label="judging"), strict=True):
        same = None if reply.text is None else read_same(reply.text)
        if same is not None:
            verdict = replace(found[i].verdict, correct=same, reason="right" if same else "wrong")
            found[i] = replace(found[i], verdict=verdict, judged_by="llm")
    return found


def is_unread(row: Answered) -> bool:
    """Whether the response says something after its thoughts that the rules cannot read."""
    if row.verdict.correct is True or row.verdict.reason in ("right", "wrong"):
        return False
    return bool((answer_part(row.response) or "").strip())


def _question(row: Answered) -> ChatQuestion:
    said = (answer_part(row.response) or "").strip()[-MAX_CHARS:]
    example = row.example
    choices = example.columns.get("choices")
    gold = str(example.answer)
    if choices and len(gold) == 1 and ord(gold) - ord("A") in range(len(choices)):
        gold = f"{gold}. {choices[ord(gold) - ord('A')]}"
    return ChatQuestion(example.id, fill(SAME_ANSWER, question=question_text(example), answer=gold, response=said))
