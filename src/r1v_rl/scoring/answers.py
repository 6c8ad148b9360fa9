"""A final answer compared with the gold: what reading alone can decide, in one pass over the text and without sympy.

Whatever this cannot decide goes to `r1v_rl.scoring.equivalence`, which runs only inside a worker process
(`r1v_rl.scoring.workers`).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from r1v_rl.errors import UserError
from r1v_rl.scoring.exact import read_number, same_number
from r1v_rl.scoring.extraction import ANSWER_KINDS, last_box, last_formula

Reason = Literal["right", "wrong", "no answer", "unparsable", "timeout", "crashed"]
REASONS: tuple[Reason, ...] = ("right", "wrong", "no answer", "unparsable", "timeout", "crashed")

MAX_ANSWER_CHARS = 4096
"""A longer answer is compared as a string only: no gold of a person's needs more, and to read it takes seconds."""

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "﹣": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": None,
        "\ufeff": None,
    }
)
_SAME_COMMAND = re.compile(r"\\(?:displaystyle|left|right|!)(?![A-Za-z])|\\(?:d|t|c)frac(?![A-Za-z])|\\[;:] ?|~|\s+")
_TEXT_WRAP = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s?\{([^{}]*)\}")
_NUMBER_MARKS = re.compile(r"^(?:\\?\$|[€£¥₹])\s?|\s?\^\s?(?:\\circ|\{\s?\\circ\s?\})\s?$|\s?\\degree\s?$|[.,]$")
_GLUE = re.compile(r"(?<![0-9A-Za-z}]) +| +(?![0-9A-Za-z\\{])")
_LETTER = re.compile(r"[\s(\[*]*([A-Z])[)\]*]*\s*(?:[.):]+\s*(.*))?", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]{2,}+(?:[ -][^\W\d_]++)*+")
_LONG_WORDS = re.compile(r"[^\W\d_]{4,}+|[^\W\d_]{2,}+(?: [^\W\d_]{2,}+)++")
_OTHER_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_ENDS = " \t\n.,;:!?*\"'`"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge says of one completion."""

    correct: bool | None
    """None where nobody can tell: the gold is unreadable, or the grader died twice on this answer."""
    answer: str | None
    """The final answer as the completion states it, cut at 200 characters; None where there is none."""
    reason: Reason
    """`unparsable`: the answer (or, with `correct` None, the gold) cannot be read; `timeout`: its reading or
    comparison was cut off, which counts as not correct; `crashed`: the grader process died."""


def verdict(correct: bool | None, answer: str | None, reason: Reason | None = None) -> Verdict:
    """A verdict with the answer cut to a length that can be logged."""
    return Verdict(correct, None if answer is None else answer[:200], reason or ("right" if correct else "wrong"))


def parse_gold(answer: Any, kind: str = "math") -> str:
    """The gold as the text that answers are compared with: out of its box, `####` mark or math delimiters.

    The whole of the remaining text is the gold, never a number found in it.

    Raises:
        UserError: If it is empty, not a string or a number, or `kind` is unknown.
    """
    if kind not in ANSWER_KINDS:
        raise UserError(f"answer_kind must be one of {', '.join(ANSWER_KINDS)}; received {kind!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"the gold answer must be a string or a number; received {type(answer).__name__}")
    text = str(answer).strip()
    box = last_box(text)
    if box is not None:
        text = box
    elif "####" in text:
        text = text.rpartition("####")[2]
    elif text[:1] == "$" or text[:2] in (r"\(", r"\["):
        formula = last_formula(text)
        if formula is not None and len(formula) >= len(text) - 6:
            text = formula
    text = text.strip()
    if not text:
        raise UserError("the gold answer must not be empty")
    return text


def quick_verdict(answer: str, gold: str, kind: str = "math", choices: Sequence[str] | None = None) -> Verdict | None:
    """The verdict where reading alone decides it, else None (math and number only).

    Args:
        gold: What `parse_gold` returned.
        choices: The options of a multiple-choice question, in the order A, B, C, ...
    """
    if kind == "choice":
        return _choice_verdict(answer, gold, choices)
    if kind == "text":
        return verdict(plain_text(answer) == plain_text(gold), answer)
    if answer == gold:
        return verdict(True, answer)
    if answer.isdecimal() and gold.isdecimal() and answer.isascii() and gold.isascii():
        return verdict(answer.lstrip("0") == gold.lstrip("0"), answer)
    if normalised(answer) == normalised(gold):
        return verdict(True, answer)
    if _is_words(gold):
        return verdict(plain_text(answer) == plain_text(gold), answer)
    if re.fullmatch(r"[A-J]", plain_math(gold)):
        return verdict(_letter(answer, None) == plain_math(gold), answer)
    gold_number, answer_number = read_number(_number_text(gold)), read_number(_number_text(answer))
    if gold_number is not None and answer_number is not None:
        return verdict(same_number(gold_number, answer_number), answer)
    if len(answer) > MAX_ANSWER_CHARS:
        return verdict(False, answer, "unparsable")
    return None


def plain_math(text: str) -> str:
    """The same formula in ASCII and LaTeX for Unicode operators and digits, without commands that only set its look.

    Superscript digits stay as they are: folding them would turn 5² into 52.
    """
    text = text.translate(_SYMBOLS)
    if not text.isascii():
        text = "".join(_ascii(char) for char in text)
    text = _SAME_COMMAND.sub(_replace_command, text)
    while (unwrapped := _TEXT_WRAP.fullmatch(text.strip())) is not None:
        text = unwrapped[1]
    return text.strip().strip("$").strip()


@lru_cache(maxsize=4096)
def normalised(text: str) -> str:
    """The form in which two strings are compared for equality: `plain_math` without spaces that carry no meaning.

    A space between two digits or letters stays, since 2 1/2 is not 21/2.
    """
    return _GLUE.sub("", plain_math(text)).removesuffix(".")


def plain_text(text: str) -> str:
    """Words for comparison: NFKC, case folded, LaTeX text commands and surrounding punctuation removed, one space
    between."""
    text = _TEXT_WRAP.sub(r"\1", text)
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.replace("$", " ").split()).strip(_ENDS)


def _is_words(gold: str) -> bool:
    """Whether the gold is a word or words, which as a formula would be a product of letters, equal to its anagrams."""
    wrapped = _TEXT_WRAP.fullmatch(gold.strip())
    return (_WORDS.fullmatch(wrapped[1].strip()) if wrapped else _LONG_WORDS.fullmatch(gold.strip())) is not None


def _number_text(text: str) -> str:
    text = plain_math(text)
    for _ in range(2):
        text = _NUMBER_MARKS.sub("", text)
    return text


def _replace_command(match: re.Match[str]) -> str:
    token = match[0]
    if token.endswith("frac"):
        return r"\frac"
    return "" if token.startswith((r"\l", r"\r", r"\d", r"\!")) else " "


def _ascii(char: str) -> str:
    if char.isascii():
        return char
    if 0xFF01 <= ord(char) <= 0xFF5E:
        return chr(ord(char) - 0xFEE0)
    return str(unicodedata.decimal(char)) if char.isdecimal() else char


def _choice_verdict(answer: str, gold: str, choices: Sequence[str] | None) -> Verdict:
    gold_letter = _letter(gold, choices)
    if gold_letter is None:
        return verdict(None, answer, "unparsable")
    answer_letter = _letter(answer, choices)
    if answer_letter is None:
        return verdict(False, answer, "unparsable")
    return verdict(answer_letter == gold_letter, answer)


def _letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The one option that `text` names: by its capital letter, alone or before the option's text, or by that text."""
    text = _TEXT_WRAP.sub(r"\1", text).strip().strip("$").strip()
    names = [plain_text(str(choice)) for choice in choices or ()]
    if plain_text(text) in names and names.count(plain_text(text)) == 1 and len(text) > 1:
        return chr(ord("A") + names.index(plain_text(text)))
    match = _LETTER.fullmatch(text[:MAX_ANSWER_CHARS])
    if match is None:
        words = re.fullmatch(r"\(([A-Z])\)\s+(.+)", text[:MAX_ANSWER_CHARS], re.DOTALL)
        if words is None:
            return None
        match = words
    letter, rest = match[1], (match[2] or "").strip()
    if names:
        index = ord(letter) - ord("A")
        return letter if index < len(names) and (not rest or plain_text(rest) == names[index]) else None
    return None if _OTHER_LETTER.search(rest) else letter
