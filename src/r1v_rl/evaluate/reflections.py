"""Where a chain of thought starts to reflect ("Wait, ...", "Alternatively, ..."), by token.

Skywork R1V3 (arXiv:2507.06167) chooses its checkpoint by the entropy of the next-token distribution at these places: a
model that only imitates reflection opens it without a doubt, at low entropy. The list of words is ours, theirs is not
published.
"""

import re
from collections.abc import Sequence
from typing import Any

REFLECTIONS = ("wait", "alternatively", "hmm")


def reflection_openings(text: str, words: Sequence[str] = REFLECTIONS) -> list[int]:
    """Offsets of the words that open a sentence or a line, also after "But", "So", "Oh" or "Hold on"; any case."""
    names = "|".join(map(re.escape, words))
    opening = re.compile(
        rf"(?:\A|[\n.!?…>])[\s\"'*)\]]*(?:(?:but|so|oh|hold on)\b[\s,]*)?\b({names})m*\b", re.IGNORECASE
    )
    return [match.start(1) for match in opening.finditer(text)]


def opening_tokens(token_ids: Sequence[int], tokenizer: Any, words: Sequence[str] = REFLECTIONS) -> list[int]:
    """Positions in a completion of the tokens that open a reflection."""
    text = tokenizer.decode(token_ids)
    return [_token_at(offset, token_ids, tokenizer) for offset in reflection_openings(text, words)]


def _token_at(offset: int, token_ids: Sequence[int], tokenizer: Any) -> int:
    """The token that writes the character at `offset` of the decoded text."""
    low, high = 0, len(token_ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(token_ids[: middle + 1])) > offset:
            high = middle
        else:
            low = middle + 1
    return low
