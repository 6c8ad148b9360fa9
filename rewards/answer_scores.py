"""A scorer to copy and edit: whole numbers from 0 to 5 for worked answers to any dataset, by a rule, without a judge.

scorer: rewards/answer_scores.py:answer_scores
"""

from r1v_rl.scoring import judge_answers
from r1v_rl.scoring.format import has_format

NUM_REASONING_WORDS = 5


def answer_scores(completions, answer, answer_kind=None, **columns):
    """0: wrong answer; 2: right, in another format; 4: right, hardly reasoned; 5: right, with its reasoning."""
    texts = [completion[0]["content"] for completion in completions]
    kinds = [kind or "math" for kind in answer_kind or [None] * len(texts)]
    verdicts = judge_answers(texts, answer, kinds)
    return [
        None if verdict.correct is None else _score(text, verdict.correct)
        for text, verdict in zip(texts, verdicts, strict=True)
    ]


def _score(text, is_right):
    if not is_right:
        return 0
    if not has_format(text):
        return 2
    reasoning = text.partition("</think>")[0].replace("<think>", "")
    return 5 if len(reasoning.split()) >= NUM_REASONING_WORDS else 4
