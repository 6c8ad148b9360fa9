"""A final answer compared with the gold: what reading alone can decide, in one pass over the text and without sympy.

Whatever this cannot decide goes to `r1v_rl.scoring.equivalence`, which runs only inside a worker process
(`r1v_rl.scoring.workers`).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from r1v_rl.errors import UserError
from r1v_rl.scoring.exact import ExactNumber, read_number, same_number
from r1v_rl.scoring.extraction import ANSWER_KINDS, find_stated, inside_delimiters, last_boxes
from r1v_rl.scoring.units import Quantity, read_quantity

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
_TEXT_WRAP = re.compile(r"\\(?:text|textnormal|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s?\{([^{}]*)\}")
_INLINE = re.compile(r"(?<!\\)\$([^$]*)(?<!\\)\$")
_GLUE = re.compile(r"(?<![0-9A-Za-z}]) +| +(?![0-9A-Za-z\\{])")
_AROUND_BRACES = re.compile(r"(?<=[A-Za-z]) +(?=\{)|(?<=\}) +|(?<=\{) +| +(?=\})")
_NUMBERS = re.compile(r"\s*(\\\{|[(\[]|)([^(){}\[\]]{1,400},[^(){}\[\]]{1,400}?)(\\\}|[)\]]|)\s*")
_NO_SPACE = re.compile(r"\\!\s*")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)|\\")
"""`1,234` may be a number, where `1, 234` is a list; and other commands are sympy's."""
_LETTER = re.compile(r"[\s(\[*]*([A-Z])[)\]*]*\s*(?:[.):]+\s*(.*))?", re.DOTALL)
_LETTER_AND_TEXT = re.compile(r"(?:\((?=[A-Z]\))|(?=[B-HJ-Z]\s))([A-Z])\)?\s+(.+)|([A-Z])\s*(\(.+\))\.?", re.DOTALL)
"""`(B) red`, `B (red)` and `B red`; `A` and `I` without a mark may be words."""
_LETTER_ALONE = re.compile(r"[\s(\[*]*[A-Z][)\]*.\s]*")
_LETTER_LAST = re.compile(r"\A([^()]*[^()\s])\s*(\([A-Z]\))\.?\Z")
_ANNOUNCED = re.compile(
    r"(?:(?:the\s++)?(?:(?:correct|right|final|best)\s++)?(?:answer|option|choice)(?:\s*+:|\s++is\b(?:\s*+:)?|\s)\s*+){1,2}",
    re.IGNORECASE,
)
_SPACING = re.compile(r"\\[ ,;:]|~|\\q?quad(?![A-Za-z])")
_WORDS = re.compile(r"[^\W\d_]{2,}+(?:[ -][^\W\d_]++)*+")
_LONG_WORDS = re.compile(r"[^\W\d_]{4,}+|[^\W\d_]{2,}+(?: [^\W\d_]{2,}+)++")
_SHORT_WORD = re.compile(r"[A-Za-z][a-z]{2}|[IVXLC]{2,}")
"""Words where both sides are such."""
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

    The whole of the remaining text is the gold, never a number found in it. A worked solution that says `the answer is`
    states its gold there.

    Raises:
        UserError: If it is empty, not a string or a number, or `kind` is unknown.
    """
    if kind not in ANSWER_KINDS:
        raise UserError(f"answer_kind must be one of {', '.join(ANSWER_KINDS)}; received {kind!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"the gold answer must be a string or a number; received {type(answer).__name__}")
    text = str(answer).strip()
    box = last_boxes(text)
    if box is not None:
        text = box
    elif kind != "text" and (stated := find_stated(text)):
        text = stated
    elif text[:1] == "$" or text[:2] in (r"\(", r"\["):
        text = inside_delimiters(text.rstrip(" .,;"))
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
    if _is_words(gold) or (_SHORT_WORD.fullmatch(gold) and _SHORT_WORD.fullmatch(plain_math(answer))):
        return verdict(plain_text(answer) == plain_text(gold), answer)
    if re.fullmatch(r"[A-J]", plain_math(gold)):
        return verdict(_letter(answer, None) == plain_math(gold), answer)
    same = _states_same(answer, gold)
    if same is None:
        same = _same_numbers(answer, gold)
    if same is not None:
        return verdict(same, answer)
    if len(answer) > MAX_ANSWER_CHARS:
        return verdict(False, answer, "unparsable")
    return None


def _same_numbers(answer: str, gold: str) -> bool | None:
    """Whether two lists of plain numbers in equal brackets are equal; None where one is anything else. Tuples and
    intervals have an order, sets and lists without brackets have none."""
    lists = []
    for text in (gold, answer):
        match = _NUMBERS.fullmatch(plain_math(text))
        if match is None or _THOUSANDS.search(match[2]):
            return None
        numbers = [number for part in match[2].split(",") if (number := read_number(part.strip())) is not None]
        if len(numbers) <= match[2].count(","):
            return None
        lists.append((match[1] + match[3], numbers))
    (gold_brackets, golds), (answer_brackets, answers) = lists
    in_order = len(golds) == len(answers) and all(map(same_number, golds, answers))
    if gold_brackets != answer_brackets:
        return True if in_order and {gold_brackets, answer_brackets} == {"", "()"} else None
    if gold_brackets in ("", r"\{\}"):
        return _all_in(golds, answers) and _all_in(answers, golds)
    return in_order


def _all_in(some: list[ExactNumber], others: list[ExactNumber]) -> bool:
    return all(any(same_number(item, other) for other in others) for item in some)


def plain_math(text: str) -> str:
    """The same formula in ASCII and LaTeX for Unicode operators and digits, without commands that only set its look.

    Superscript digits stay as they are: folding them would turn 5² into 52.
    """
    text = _INLINE.sub(r"\1", text).translate(_SYMBOLS)
    if not text.isascii():
        text = "".join(_ascii(char) for char in text)
    text = _SAME_COMMAND.sub(_replace_command, _NO_SPACE.sub("", text))
    while (unwrapped := _TEXT_WRAP.fullmatch(text.strip())) is not None:
        text = unwrapped[1]
    return text.strip().strip("$").strip()


@lru_cache(maxsize=4096)
def normalised(text: str) -> str:
    """The form in which two strings are compared for equality: `plain_math` without spaces that carry no meaning.

    A space between two digits or letters stays, since 2 1/2 is not 21/2.
    """
    return _AROUND_BRACES.sub("", _GLUE.sub("", plain_math(text))).removesuffix(".")


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


def units_conflict(gold: Quantity, answer: Quantity) -> bool:
    """Whether both have a unit and the units measure different things. Percent and degrees are numbers too."""
    if gold.dimension is None or answer.dimension is None or gold.dimension == answer.dimension:
        return False
    return {gold.dimension, answer.dimension} != {(("degree", 1),), (("radian", 1),)}


def compared_factors(gold: Quantity, answer: Quantity, gold_size: Fraction | None) -> tuple[Fraction, Fraction]:
    """What the two values are multiplied with before they are compared.

    Units of one kind are converted; a unit that only one side has is taken to be meant on the other. A percent sign on
    one side alone is read in the one way that fits the gold: a gold above 1 (`50`, `50\\%`) names the percent, so its
    sign may be left out and `5` is `5\\%` and never `500\\%`; a gold of at most 1 without a sign is a fraction, so that
    `0.5` is `50\\%` and never `0.5\\%`.

    Args:
        gold_size: The absolute value of the gold where it is a plain number.
    """
    if gold.dimension is not None and gold.dimension == answer.dimension:
        return gold.factor, answer.factor
    if gold.is_percent == answer.is_percent or (gold_size is not None and gold_size > 1):
        return Fraction(gold.multiple), Fraction(answer.multiple)
    return gold.factor, answer.factor


def _same_quantity(gold: Quantity, gold_number: ExactNumber, answer: Quantity, answer_number: ExactNumber) -> bool:
    size = gold_number.fraction()
    factors = compared_factors(gold, answer, None if size is None else abs(size))
    if factors[0] == factors[1] and same_number(gold_number, answer_number):
        return True
    if factors[0] != factors[1] and same_number(gold_number, answer_number, factors):
        return True
    if gold.is_percent and answer.dimension is None and size is not None and abs(size) > 1:  # 50% = 0.5
        return same_number(gold_number, answer_number, (gold.factor, Fraction(answer.multiple)))
    return False


def _number(text: str) -> ExactNumber | None:
    return read_number(text.strip().removesuffix("."))


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
    """The one option that `text` names, which may say that it is the answer or an option (`Option B`)."""
    text = _SPACING.sub(" ", _TEXT_WRAP.sub(r"\1", text))
    text = unicodedata.normalize("NFKC", text).strip().strip("$").strip().removesuffix("\u3002")
    if (letter := _named_letter(text, choices)) is not None or (announced := _ANNOUNCED.match(text)) is None:
        return letter
    named = text[announced.end() :]
    return _named_letter(named, choices) if choices or _LETTER_ALONE.fullmatch(named) else None


def _named_letter(text: str, choices: Sequence[str] | None) -> str | None:
    """An option named by its capital letter, alone or beside the option's text, or by that text."""
    named = [chr(ord("A") + index) for index, choice in enumerate(choices or ()) if _same_option(text, str(choice))]
    if len(named) == 1 and not re.fullmatch("[A-Z]", text):
        return named[0]
    text = text[:MAX_ANSWER_CHARS]
    if choices:
        text = _LETTER_LAST.sub(r"\2 \1", text)
    match = _LETTER.fullmatch(text) or _LETTER_AND_TEXT.fullmatch(text)
    if match is None:
        return None
    letter, rest = (group or "" for group in (match.groups()[2:] if match[1] is None else match.groups()[:2]))
    rest = rest.strip()
    rest = rest[1:-1] if rest.startswith("(") and rest.endswith(")") else rest
    if choices:
        index = ord(letter) - ord("A")
        return letter if index < len(choices) and (not rest or _same_option(rest, str(choices[index]))) else None
    return None if _OTHER_LETTER.search(rest) else letter


def _same_option(text: str, option: str) -> bool:
    if plain_text(text) == plain_text(option) or normalised(text) == normalised(option):
        return True
    return any(map(str.isdigit, text)) and _states_same(text, option) is True


def _states_same(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers with their units are one quantity; None where one is no plain number."""
    gold_quantity, answer_quantity = read_quantity(plain_math(gold)), read_quantity(plain_math(answer))
    if units_conflict(gold_quantity, answer_quantity):
        return False
    gold_number, answer_number = _number(gold_quantity.value), _number(answer_quantity.value)
    if gold_number is None or answer_number is None:
        return None
    return _same_quantity(gold_quantity, gold_number, answer_quantity, answer_number)
