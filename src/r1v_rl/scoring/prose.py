"""What plain sentences state: a value, or one of a question's options. Linear in the text."""

import re
from collections.abc import Sequence
from itertools import chain

from r1v_rl.scoring.units import read_quantity

MAX_CHARS = 8000
"""Only the end of a longer text is read."""

_SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f:])[*_\"')\]]{0,4}\s+|(?<=[\u3002\uff01\uff1f])|\n+")
_CLOSING = re.compile(
    r"\?\W*$|\b(?:hope (?:this|it|that)|let me know|feel free|anything else|happy to help|here to help)\b",
    re.IGNORECASE,
)
"""Questions back and courtesies say nothing about the answer."""
_CONCLUDES = re.compile(
    r"(?:^\W*|[,;\uff0c]\s+)(?:so|thus|hence|therefore|consequently|overall|in (?:conclusion|summary|total|all))\b"
    r"|\u56e0\u6b64|\u6240\u4ee5|\u6545",
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:not|never|whether|if|maybe|perhaps|might|could|guess|either|n't|cannot|impossible)\b|n't\b|\bbetween\s+(?:[\d$\\(]|[A-Z]\b)|\?|_{2,}",
    re.IGNORECASE,
)
"""A sentence with one of these, or with a blank that is left open, states nothing."""
_CHOSEN = re.compile(
    r"(?:\b(?:answer|option|choice)\b[^.\n:?!]{0,60}?(?:\b(?:is|be)\b\s*:?|:)"
    r"|\b(?:choose|select|pick)\b(?: (?:option|choice|answer))?"
    r"|\u7b54\u6848\s?[\u662f\u4e3a:\uff1a]|\u6545?\u9009(?:\u9879)?[:\uff1a]?)"
    r"\s*(?:(?:the )?(?:option|choice|letter)\b)?[\s*_\"'\u201c]*(?P<open>[(\uff08\[]?)(?P<letter>[A-Z])"
    r"(?:(?P<close>[)\uff09\].:*]|\s*$|\s*\n|(?=[^A-Za-z0-9\s'_^+=]))|(?=\s))",
    re.IGNORECASE,
)
_OPENING = re.compile(r"\W{0,4}\(?([A-Z])(?:\)|[.:](?=\s))")
_HEAD_OF_LINE = re.compile(r"(?:^|\n)[\s*]{0,4}([A-Z])[).:](?=\s|$)")
_LISTED = re.compile(r"\W{0,3}(?:[,/&]|\bor\b|\band\b|\u548c|\u6216)\s*\(?([A-Z])(?![a-z])")
_ASIDE = re.compile(r"\b(?:not|since|because|as|while|whereas|unlike|rather)\b", re.IGNORECASE)
"""What follows one of these behind a chosen letter speaks of other options."""
MARKED_LETTER = re.compile(r"[(\uff08]([A-Z])[)\uff09]")
_YES_NO = re.compile(
    r"\W*(?:(?:so|thus|hence|therefore)\b\W*)?(?:the answer is\W+)?(yes|no)(?:[,.;:!*]|\s*$)", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:an?|the) ")
_QUOTES = re.compile(r"[*_\"\u201c\u201d`]|(?<!\w)['\u2018]|['\u2019](?!\w)")
_AMOUNT = r"[-\u2212]?(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?(?:\s?/\s?\d++)?"
_UNIT = r"(?:\s?(?P<{0}>%|[$\u20ac\u00a3\u00b0]|[^\W\d_]{{1,14}})(?:\s?(?:per|/)\s?[^\W\d_]{{1,9}})?)?"
_STATES = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals|equal to)\s+"
    r"(?:(?:about|approximately|around|roughly|exactly|only|a total of)\s+)?"
    rf"(?P<mark>\*\*)?(?P<money>\\?[$\u20ac\u00a3]\s?)?(?P<value>{_AMOUNT}){_UNIT.format('unit')}"
    rf"|\*\*\s?(?P<bold>{_AMOUNT}){_UNIT.format('bold_unit')}\s?\*\*)"
    r"(?!\w|[.,:]\d|(?:\s[a-z]{1,14}){0,3} and (?:\d|\*\*)|\s*[*\u00d7+/=^(<>-](?!\*)|\\)"
)
_COMPARES = frozenset(("times", "more", "less", "fewer", "of", "out", "to", "or", "and", "x"))
"""Words behind a number that make it no value of its own: `3 times larger`, `4 of 7`."""


def sentences(text: str) -> list[str]:
    """The sentences and lines that say something about the answer."""
    parts = (part.strip() for part in _SENTENCE_END.split(text[-MAX_CHARS:]))
    return [part for part in parts if part and _CLOSING.search(part) is None]


def stated_value(text: str) -> str | None:
    """The number, with its unit where it has a known one, that the last concluding sentence (`So`, `Therefore`) states,
    or else the only one that any sentence states: behind `is` and its like, or in bold."""
    parts = sentences(text)
    concluding = [part for part in parts if _CONCLUDES.search(part)]
    for group in (concluding[-1:], parts):
        for is_bold in (False, True):
            found = {value for part in group for value in _values(part, is_bold=is_bold)}
            if found:
                return found.pop() if len(found) == 1 else None
    return None


def chosen_letter(text: str, choices: Sequence[str] | None) -> str | None:
    """The letter behind the last `answer is`, `option:` or their like, or at the head of the text; with what follows it
    in its sentence where that names another option."""
    last = None
    for match in _CHOSEN.finditer(text[-MAX_CHARS:]):
        is_word = not match["open"] and match["close"] is None and match["letter"] in "AI"  # an article, a pronoun
        if match["letter"].isupper() and not is_word:
            last = match
    if last is not None:
        rest = _SENTENCE_END.split(text[-MAX_CHARS:][last.end() :], maxsplit=1)[0]
        if last["close"] == "." and _plain(rest) not in map(_plain, choices or ()):
            rest = ""  # the next sentence
        return _unless_contradicted(last["letter"], rest, choices)
    head = _OPENING.match(text)
    if head is None:
        return None
    return _unless_contradicted(head[1], text[head.end() :], choices)


def named_option(text: str, choices: Sequence[str] | None) -> str | None:
    """The option that the sentences name: the only one of the last concluding sentence that names any, or the only one
    in all of them; `yes` and `no` count at the head of a sentence, numbers where they are stated."""
    if not choices:
        return None
    parts = sentences(text)
    plain = {_plain(choice): choice for choice in choices}
    if {"yes", "no"} <= plain.keys():
        said = {match[1].lower() for match in map(_YES_NO.match, parts) if match}
        if len(said) == 1:
            return plain[said.pop()]
    parts = [part for part in parts if DOUBT.search(part) is None]
    concluding = [part for part in parts if _CONCLUDES.search(part)]
    for group in (concluding[-1:], parts):
        named = set(chain.from_iterable(_named(part, choices) for part in group))
        if len(named) == 1:
            return named.pop()
        if named:
            return None
    return None


def _unless_contradicted(letter: str, rest: str, choices: Sequence[str] | None) -> str | None:
    """The letter; with `rest` where that names another letter or, and not the letter's own, another option."""
    index = ord(letter) - ord("A")
    if choices and index >= len(choices):
        return None
    listed = _LISTED.match(rest)
    others = {*_HEAD_OF_LINE.findall(rest), *([listed[1]] if listed else [])}
    said = _ASIDE.split(rest, maxsplit=1)[0]
    others |= set(MARKED_LETTER.findall(said))
    others.discard(letter)
    if choices:
        named = _named(said, choices) | {choice for choice in choices if _plain(choice) == _plain(said)}
        others |= set() if choices[index] in named else named
    return f"{letter} {rest.strip()}"[:200] if others else letter


def _values(sentence: str, *, is_bold: bool) -> list[str]:
    """The numbers that a sentence states, behind a verb or only in bold."""
    if DOUBT.search(sentence):
        return []
    found = []
    for match in _STATES.finditer(sentence):
        value, unit = (match["bold"], match["bold_unit"]) if is_bold else (match["value"], match["unit"])
        if value is None or (unit or "").lower() in _COMPARES:
            continue
        if match["money"]:
            value = match["money"].strip() + value
        elif unit and read_quantity(f"{value} {unit}").dimension is not None:
            value = f"{value} {unit}"
        found.append(value)
    return found


def _named(sentence: str, choices: Sequence[str]) -> set[str]:
    """The options whose text stands in a sentence as words; inside a longer option's text it does not count."""
    text, named = _plain(sentence), set()
    for choice in sorted(map(str, choices), key=len, reverse=True):
        option = _ARTICLE.sub("", _plain(choice), count=1)
        if len(option) < 2 or option in ("yes", "no") or not re.search(r"[^\W\d_]{2}", option):
            continue
        pattern = re.compile(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])")
        if pattern.search(text):
            named.add(choice)
            text = pattern.sub(" ", text)
    return named


def _plain(text: str) -> str:
    return " ".join(_QUOTES.sub(" ", str(text)).casefold().split()).strip(" .,;:!")
