"""A scorer to copy and edit: whole numbers from 0 to 5 for worked answers to `scenes`, by a rule and without a judge.

    scorer: rewards/scene_scores.py:scene_scores

A scorer has the signature of a reward (see `accuracy_and_length.py`) and returns a whole number from 0 to 5 for each
answer, or None where it cannot judge. `r1v-rl iterate` trains on the rows that reach the round's `taus`, and on those
that the model got wrong.
"""

import re

from r1v_rl.scoring import judge_answers
from r1v_rl.scoring.format import has_format

CELL_NAMES = [f"{row}{column}" for row in "abcdef" for column in "123"]
"""As the chains name them: a1..c3 in the first picture, d1..f3 in the second."""
_SEEN = re.compile(r"(?<!\S)([a-f][1-3]) (?:([a-z]+) ([a-z]+) ([1-6])(?!\S)|\.)")


def scene_scores(completions, answer, scene=None, **columns):
    """0: wrong answer; 1: right, in another format; 2: right, from no look at any cell; 3: from a look at some cells;
    4: from all cells in order, not all of them as they are; 5: from all cells in order, each as it is."""
    if scene is None:
        return [None] * len(completions)
    texts = [completion[0]["content"] for completion in completions]
    verdicts = judge_answers(texts, answer, "text")
    return [
        None if verdict.correct is None else _score(text, cells, verdict.correct)
        for text, cells, verdict in zip(texts, scene, verdicts, strict=True)
    ]


def _score(text, scene, is_right):
    if not is_right:
        return 0
    if not has_format(text):
        return 1
    cells = scene.replace(" | ", " ").split()
    looks = _SEEN.findall(text)
    if not looks:
        return 2
    if [name for name, *_ in looks] != CELL_NAMES[: len(cells)]:
        return 3
    written = ["-".join(look) if look[0] else "." for _, *look in looks]
    return 5 if written == cells else 4
