"""What a benchmark's question ends with: how to answer, and where to put the answer."""

from dataclasses import dataclass

_REASON = (
    "Work through the problem step by step, with everything that the question and its pictures tell you. Do not go "
    "over the same steps again and again; where you cannot be certain, settle for the most reasonable answer. "
)
CHOICE = _REASON + "End with one line of the form\nAnswer: \\boxed{LETTER}\nwhere LETTER is that of your option."
OPEN = _REASON + "End with one line of the form\nAnswer: \\boxed{FINAL_ANSWER}"
DIRECT_CHOICE = "Reply with one line and nothing else: Answer: \\boxed{LETTER}"
DIRECT_OPEN = "Reply with one line and nothing else: Answer: \\boxed{FINAL_ANSWER}"


@dataclass(frozen=True, slots=True)
class Instructions:
    """The texts after a question with options, and after any other."""

    choice: str = CHOICE
    open: str = OPEN


DIRECT = Instructions(DIRECT_CHOICE, DIRECT_OPEN)
"""Without a chain of thought."""
