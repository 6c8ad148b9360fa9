"""A reward to copy and edit: a right answer counts the more, the shorter it is said.

    reward_funcs: [rewards/accuracy_and_length.py:accuracy_and_length]

The function's name is the metric's name. It is called once per step with keywords, each list with one entry per
completion:

* `prompts`, `completions` (chat messages: `completion[0]["content"]` is the text), `completion_ids` (its tokens);
* every column of the dataset, here `answer`;
* `trainer_state`, `log_extra(name, values)` for a column of the completions table, `log_metric(name, value)` for a
  scalar.

It returns one number per completion, or None where it cannot judge: that completion is then left out of its group. It
gets copies, so it may change what it is given; it may be `async def`.
"""

from r1v_rl.scoring import judge_answers

FULL_LENGTH = 512
"""Tokens from which on a right answer earns only half."""


def accuracy_and_length(completions, completion_ids, answer, log_metric=None, **columns):
    """0 for a wrong answer; for a right one from 1 (no tokens) down to 0.5 (`FULL_LENGTH` tokens or more)."""
    texts = [completion[0]["content"] for completion in completions]
    verdicts = judge_answers(texts, answer)
    rewards = []
    for verdict, token_ids in zip(verdicts, completion_ids, strict=True):
        if verdict.correct is None:
            rewards.append(None)
        else:
            rewards.append(verdict.correct * (1.0 - 0.5 * min(1.0, len(token_ids) / FULL_LENGTH)))
    if log_metric is not None and completion_ids:
        log_metric("length/mean_tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return rewards
