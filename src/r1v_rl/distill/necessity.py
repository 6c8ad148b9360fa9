"""Whether a question needs its pictures, by rules: how much of what question and answer say is seen; needs no model.

What rules can see: colours, and in drawings shapes, their number and whether they differ in size. They read no writing
and know no objects; a question that speaks of neither colour, shape nor size is scored `UNKNOWN`.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from r1v_rl.distill.drawing import COLORS, FULLNESS, Shape, Sight
from r1v_rl.distill.prompts import SubScore

UNKNOWN = 0.5
SIZES_DIFFER = 2.0
"""Ratio of two shapes' areas from which on they differ in size."""

_COLOR_WORDS = {name: name for name in COLORS} | {"gray": "grey", "violet": "purple", "cyan": "blue", "gold": "yellow"}
_SHAPE_WORDS = {name: name for name in FULLNESS} | {"disc": "circle", "disk": "circle"}
_ANY_SHAPE = ("object", "shape", "item", "figure", "thing")
_COLOR = re.compile(rf"\b({'|'.join(_COLOR_WORDS)})\b", re.I)
_SHAPE = re.compile(rf"\b({'|'.join(_SHAPE_WORDS)})s?\b", re.I)
_SIZE = re.compile(r"\b(?:sizes?|small(?:er|est)?|medium|large[rst]*|big(?:ger|gest)?)\b", re.I)
_COUNT = re.compile(
    rf"\bhow many ((?:(?P<color>{'|'.join(_COLOR_WORDS)}) )?(?P<shape>{'|'.join([*_SHAPE_WORDS, *_ANY_SHAPE])})s?)"
    r"(?: are| do you see| can be seen)?(?: there| shown| visible| present)?"
    r"(?: (?:in|on) (?:the|this) (?:image|picture|drawing|diagram))?(?: in total| altogether)?[?.]",
    re.I,
)
_OPTION = re.compile(r"\(([A-H])\)[ \t]*([^()\n]+)|^[ \t]*([A-H])[.):][ \t]+(.+)$", re.M)
_DIGITS = r"\d{1,9}(?:\.\d{1,9})?"
_NUMBER = re.compile(rf"-?{_DIGITS}")
_SUM = re.compile(
    rf"(?<![\d.])({_DIGITS}) ?(\+|-|\*|/|×|÷|plus|minus|times|divided by) ?({_DIGITS}) ?(?:=|\?|\.?$)", re.I
)
_VERDICTS = {"true", "false", "yes", "no"}
_DENIALS = {"false", "no"}

Claim = tuple[str, bool]
"""What question or answer speaks of, and whether it is seen."""


def necessity_by_rules(question: str, answer: str, choices: Sequence[str] | None, sights: Sequence[Sight]) -> SubScore:
    """The share of the claims that the pictures bear out; `UNKNOWN` where rules can check none; 0 where the pictures
    hold nothing or the text gives the answer away.

    Args:
        question: The conversation's text, with its options.
        answer: The gold answer: the text of an option, its letter, or any other.
        choices: The options, where the row lists them.
        sights: What is seen of each picture; at least one.
    """
    options = {a or b: (text or line).strip() for a, text, b, line in _OPTION.findall(question)}
    options |= {chr(ord("A") + i): str(choice) for i, choice in enumerate(choices or ())}
    stem = _OPTION.sub(" ", question.replace("<image>", " ")).strip()
    answer = answer.strip()
    said = answer if answer in options.values() else options.get(answer, answer)
    if all(sight.is_blank for sight in sights):
        return SubScore(0.0, "the picture is blank")
    if given := _given_away(stem, said):
        return SubScore(0.0, given)
    claims = _claims(stem, said, sights)
    if not claims:
        return SubScore(UNKNOWN, "nothing that rules can see")
    seen = [name for name, is_seen in claims if is_seen]
    missing = [name for name, is_seen in claims if not is_seen]
    parts = [f"{word}: {', '.join(names)}" for word, names in (("seen", seen), ("not seen", missing)) if names]
    return SubScore(round(len(seen) / len(claims), 6), "; ".join(parts))


def _given_away(stem: str, answer: str) -> str:
    """How the text alone tells the answer: a sum, or a word that stands in it; empty where it does not.

    A number may stand there by chance; a verdict, or one of two things to choose from ("red or blue?"), is no answer.
    """
    if (found := _SUM.search(stem)) and _result(*found.groups()) == _number(answer):
        return f"the text alone: {found[0].strip(' ?.=')} is {answer}"
    if not re.search("[a-z]{3}", answer, re.I) or answer.lower() in _VERDICTS:
        return ""
    named = rf"\b{re.escape(answer)}\b"
    if re.search(named, stem, re.I) and not re.search(rf"{named},? or\b|\bor (?:the |an? )?{named}", stem, re.I):
        return f"the text alone names {answer}"
    return ""


def _claims(stem: str, answer: str, sights: Sequence[Sight]) -> list[Claim]:
    """What is to be seen if these are the question's own pictures; nothing of a statement that is denied."""
    shapes = None
    if all(sight.shapes is not None for sight in sights):
        shapes = [shape for sight in sights for shape in sight.shapes or ()]
    if count := _COUNT.search(stem):
        number = _number(answer)
        if shapes is None or number is None or any(sight.has_more for sight in sights):
            return []
        found = sum(_is_meant(shape, count["color"], count["shape"]) for shape in shapes)
        return [(f"{answer} {count[1]} ({found} counted)", found == number)]
    if answer.lower() in _DENIALS:
        return []
    words = f"{stem} {answer}"
    claims = [(name, any(name in sight.colors for sight in sights)) for name in _named(_COLOR, _COLOR_WORDS, words)]
    if shapes is not None:
        claims += [(name, any(name in shape.names for shape in shapes)) for name in _named(_SHAPE, _SHAPE_WORDS, words)]
        if _SIZE.search(words):
            claims.append(("sizes that differ", any(_sizes_differ(sight) for sight in sights)))
    return claims


def _named(pattern: re.Pattern[str], names: Mapping[str, str], words: str) -> list[str]:
    return list(dict.fromkeys(names[word.lower()] for word in pattern.findall(words)))


def _is_meant(shape: Shape, color: str | None, noun: str) -> bool:
    named = _SHAPE_WORDS.get(noun.lower())
    return (named is None or named in shape.names) and (color is None or _COLOR_WORDS[color.lower()] in shape.colors)


def _sizes_differ(sight: Sight) -> bool:
    """Whether two shapes of one colour do."""
    areas: dict[frozenset[str], list[float]] = {}
    for shape in sight.shapes or ():
        areas.setdefault(shape.colors, []).append(shape.area)
    return any(max(found) >= SIZES_DIFFER * min(found) for found in areas.values())


def _number(text: str) -> Fraction | None:
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _result(left: str, sign: str, right: str) -> Fraction:
    a, b = Fraction(left), Fraction(right)
    match sign.lower():
        case "+" | "plus":
            return a + b
        case "-" | "minus":
            return a - b
        case "*" | "×" | "times":
            return a * b
    return a / b if b else Fraction(0)
