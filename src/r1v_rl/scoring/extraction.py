"""Where the final answer stands in a completion. Every function is one pass over the text, whatever that holds."""

import re
from typing import Literal, get_args

AnswerKind = Literal["math", "number", "choice", "text"]
ANSWER_KINDS: tuple[str, ...] = get_args(AnswerKind)

_BOX_OR_BRACE = re.compile(r"(?<!\\)\\++(?:boxed|fbox)\s*+\{|\\[{}\\]|[{}]")
_ANSWER_TAG = re.compile(r"<(/?)answer>")
_STATED = re.compile(r"####|\b[Aa]nswer(?:\*\*)?(?:\s{1,3}is\b|\s?:)(?:\*\*)?|\bANSWER\s?:")
_MATH_MARK = re.compile(r"\\[\[\]()]|\\\$|\$\$|\$|\\\\")
_CLOSING = {r"\[": r"\]", r"\(": r"\)", "$": "$", "$$": "$$"}
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])")
_BARE_CHARS = 200


def answer_part(completion: str) -> str | None:
    """What follows the reasoning: the text after the last `</think>`, or all of it where nothing was ever thought.

    None where a think block was opened and not closed. A prompt may have opened the block, so a completion with only
    the closing tag is ordinary; a caller that knows this puts the `<think>` back (`format.with_prompt_think`).
    """
    _, tag, tail = completion.rpartition("</think>")
    part = tail if tag else completion
    return None if "<think>" in part else part


def find_answer(completion: str, kind: str = "math") -> str | None:
    """The final answer as the completion states it, or None.

    Outside the reasoning, the first of these that is there: the last `\\boxed{}` or `\\fbox{}` with balanced braces;
    the last `<answer>` tag; the last `####`, `answer is` or `answer:`; the last formula between math delimiters (math,
    number); the only number of the last line (number); the whole text where it is one short line and not prose.
    """
    part = answer_part(completion)
    if part is None:
        return None
    box = last_box(part)
    if box is not None:
        return box.strip() or None
    if "\\boxed" in part or "\\fbox" in part:
        return None
    tagged = _last_tagged(part)
    if tagged is not None:
        return _inside_delimiters(tagged) or None
    stated = _last_stated(part)
    if stated:
        return stated
    if kind in ("math", "number"):
        formula = last_formula(part)
        if formula:
            return formula
    if kind == "number":
        return _only_number_of_last_line(part)
    return _bare(part, kind)


def last_box(text: str) -> str | None:
    """What stands in the `\\boxed{}` or `\\fbox{}` that opens last among those that close, or None."""
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box and (best is None or start > best[0]):
                    best = (start, match.start())
        elif token.endswith("{") and len(token) != 2:
            open_braces.append((match.end(), len(token) > 1))
    return None if best is None else text[best[0] : best[1]]


def last_formula(text: str) -> str | None:
    """What stands between the last complete pair of math delimiters (`$ $`, `$$ $$`, `\\( \\)`, `\\[ \\]`), or None."""
    opened: tuple[str, int] | None = None
    formula = None
    for match in _MATH_MARK.finditer(text):
        mark = match[0]
        if opened is not None and mark == _CLOSING[opened[0]]:
            formula = text[opened[1] : match.start()].strip() or formula
            opened = None
        elif opened is None and mark in _CLOSING:
            opened = (mark, match.end())
    return formula


def _inside_delimiters(text: str) -> str:
    """`text` without math delimiters that enclose all of it, and without markdown stars and an ending full stop."""
    text = text.strip().strip("*").strip()
    for mark, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(mark) : -len(closing)]
        if len(text) > len(mark) + len(closing) - 1 and text.startswith(mark) and text.endswith(closing):
            return inner.strip() if mark not in inner else text
    return text.rstrip(".").rstrip()


def _last_tagged(text: str) -> str | None:
    opened = None
    inner = None
    for match in _ANSWER_TAG.finditer(text):
        if not match[1]:
            opened = match.end()
        elif opened is not None:
            inner = text[opened : match.start()]
            opened = None
    return inner


def _last_stated(text: str) -> str | None:
    last = None
    for last in _STATED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    line = text[last.end() :].lstrip().partition("\n")[0]
    line = line.partition("I hope it is")[0].strip()
    line = line.rpartition(" is ")[2].lstrip(": ")
    return last_formula(line) or _inside_delimiters(line) or None


def _only_number_of_last_line(text: str) -> str | None:
    lines = text.split("\n")
    last_line = next((line for line in reversed(lines) if line.strip()), "")
    found = {match[0] for match in _NUMBER.finditer(last_line)}
    return found.pop() if len(found) == 1 else None


def _bare(text: str, kind: str) -> str | None:
    text = text.strip()
    if not text or len(text) > _BARE_CHARS or "\n" in text:
        return None
    if kind == "math" and len(_WORD.findall(text)) > 2:
        return None
    return _inside_delimiters(text)
