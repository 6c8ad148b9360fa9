"""Where the final answer stands in a completion. Every function is linear in the text, whatever that holds."""

import re
from collections.abc import Sequence
from typing import Literal, get_args

from r1v_rl.scoring.prose import DOUBT, MARKED_LETTER, chosen_letter, named_option, stated_value
from r1v_rl.scoring.units import read_quantity

AnswerKind = Literal["math", "number", "choice", "text"]
ANSWER_KINDS: tuple[str, ...] = get_args(AnswerKind)

_BOX_OR_BRACE = re.compile(r"(?<!\\)\\++(?:boxed|fbox)\s*+\{|\\[{}\\]|[{}]")
_ANSWER_TAG = re.compile(r"<(/?)answer>")
_STATED = re.compile(
    r"####|\b[Aa]nswer(?:\*\*)?(?:\s{1,3}is\b|\s?:)(?:\*\*)?|\bANSWER\s?:"
    r"|\u7b54\u6848\s?[\u662f\u4e3a:\uff1a]|\b(?:[Oo]ption|[Cc]hoice)(?:\s[Ll]etter)?(?:\s{1,3}is\b|\s?:)"
)
_NEXT_SENTENCE = re.compile(
    r"(?<![\sA-Z])[.!](?:\*\*)?\s+(?=[A-Z])|(?<=\u3002)|(?<=[$\d)}]),?\s+(?=(?:because|since)\b)"
)
_MATH_MARK = re.compile(r"\\[\[\]()]|\\\$|\$\$|\$|\\\\")
_CLOSING = {r"\[": r"\]", r"\(": r"\)", "$": "$", "$$": "$$"}
_LISTED = re.compile(r"[ ,;/]*(?:(?:or|and)[ ,]*)?")
_VERB_BEFORE = re.compile(r"(?:\b(?:is|are|equals|equal to)|[=:])\s*\Z")
_THUS = re.compile(r",?\s(?:thus|so|hence|therefore),?\s")
_VERB = re.compile(r"\s(?:is|are|equals|equal to)\s")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])")
_BARE_CHARS = 200
_SENTENCE_CHARS = 1000
_JOIN_CHARS = 60
_JOINS = ("and", "or", ",", ";", "&")
_TAKEN_BACK = frozenset(("no", "not", "wait", "but", "actually", "instead", "rather", "then", "so", "hmm", "sorry"))
"""Words between two boxes after which the second replaces the first."""
_GLUE_COMMANDS = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s?(?=\{)|\\q?quad|\\[,;:!()\[\] ]|[{}$]|(?=[,;])|(?<=[,;])")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s?\{([^{}]*)\}")
_CHAT_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text)\|>|</s>|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_OPENING_WORD = re.compile(r"\s*(?:[^\W\d_]{3,}[ :]|[^\W\d_a-zA-Z])")
"""A sentence begins with a word, or with a letter of another script than Latin."""
_NAME_AT_END = re.compile(r"(?<![\w+*/^()=\-])\s*([A-Za-z])\s*$")
_ONE_OF_SEVERAL = re.compile(r"=.*\b(?:or|and)\s+[A-Za-z]\s*$")
_VALUE = r"[-\u2212]?(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?(?:\s?/\s?\d++)?\s?%?"
_VERBS = (
    r"\b(?:is|are|equals|equal to|est|sont|vaut|es|son|ist|sind)\b"
    r"|\u00e9|\u00e8|\u662f|\u4e3a|\u70ba|\u0647\u0648|\u0647\u064a|="
)
_CONCLUSION = re.compile(
    rf"(?:(?:{_VERBS})\s*(?P<value>{_VALUE})(?P<unit>\s?(?:[^\W\d_]{{1,14}}|[$\u20ac\u00a3\u00b0]))?|\*\*(?P<bold>{_VALUE})\*\*)"
    r"\s*[)\uff09]?\s*[.\u3002!]?\s*$"
)


def answer_part(completion: str) -> str | None:
    """What follows the reasoning: the text after the last `</think>`, or all of it where nothing was ever thought.

    None where a think block was opened and not closed. A prompt may have opened the block, so a completion with only
    the closing tag is ordinary; a caller that knows this puts the `<think>` back (`format.with_prompt_think`).
    """
    _, tag, tail = completion.rpartition("</think>")
    part = tail if tag else completion
    return None if "<think>" in part else part


def find_answer(completion: str, kind: str = "math", choices: Sequence[str] | None = None) -> str | None:
    """The final answer as the completion states it, or None.

    Outside the reasoning, the first of these that is there: the last `\\boxed{}` or `\\fbox{}` with balanced braces,
    with the boxes that `,`, `and` or `or` join to it; the last `<answer>` tag; the last `####`, `answer is` or
    `answer:`; a value at the end of the last sentence, behind `=`, `is` (in several languages) or in bold (math,
    number); the last formula between math delimiters (math, number); the only number of the last line (number) or its
    only `(B)` (choice); the whole text where it is one short line and not prose. A sentence in a box or tag is read by
    the same order.
    """
    part = answer_part(completion)
    if part is None:
        return None
    part = _CHAT_TOKEN.split(part, maxsplit=1)[0]
    box = last_boxes(part)
    if box is not None:
        return _out_of_sentence(box.strip(), kind) or None
    if "\\boxed" in part or "\\fbox" in part:
        return None
    tagged = _last_tagged(part)
    if tagged is not None:
        return _out_of_sentence(inside_delimiters(tagged), kind) or None
    if kind == "choice":
        return _choice(part, choices)
    stated = find_stated(part)
    if stated:
        return stated
    if kind in ("math", "number"):
        value = _concluded(part) or last_formula(part)
        if value:
            return value
    if kind == "number":
        return _only_number_of_last_line(part) or stated_value(part)
    return _bare(part, kind)


def _choice(text: str, choices: Sequence[str] | None) -> str | None:
    """A letter where one is chosen, the option that is named, or a value where the options are values."""
    letter = chosen_letter(text, choices)
    if letter:
        return letter
    stated = find_stated(text)
    if stated:
        return named_option(stated, choices) or stated
    return (
        named_option(text, choices)
        or _only_letter_of_last_line(text)
        or (last_formula(text) or stated_value(text) or _concluded(text) if _are_values(choices) else None)
        or _bare(text, "choice")
    )


def last_boxes(text: str) -> str | None:
    """What stands in the last box, or `a, b` for the boxes `\\boxed{a}` and `\\boxed{b}` that are one answer, or None.

    Boxes are one answer where nothing stands between them but space, or a few words of one line that end in a comma,
    `and` or `or`. The same value boxed twice is one value.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    first, start, end = max(boxes, key=lambda box: box[1])
    values = [text[start:end]]
    for before in sorted((box for box in boxes if box[2] < first), key=lambda box: -box[2]):
        if before[2] >= first or not _joins(text[before[2] + 1 : first]):
            break
        values.append(text[before[1] : before[2]])
        first = before[0]
    return ", ".join(dict.fromkeys(value.strip() for value in reversed(values)))


def last_box(text: str) -> str | None:
    """What stands in the `\\boxed{}` or `\\fbox{}` that opens last among those that close, or None."""
    boxes = _boxes(text)
    if not boxes:
        return None
    _, start, end = max(boxes, key=lambda box: box[1])
    return text[start:end]


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Every box that closes: where its command stands, where its content begins and ends."""
    open_braces: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token == "}":
            if open_braces:
                command, start, is_box = open_braces.pop()
                if is_box:
                    boxes.append((command, start, match.start()))
        elif token.endswith("{") and len(token) != 2:
            open_braces.append((match.start(), match.end(), len(token) > 1))
    return boxes


def _joins(between: str) -> bool:
    if len(between) > _JOIN_CHARS or "\n" in between.strip():
        return False
    words = _GLUE_COMMANDS.sub(" ", between).split()
    return not words or (len(words) <= 6 and words[-1] in _JOINS and not _TAKEN_BACK.intersection(words))


def last_formula(text: str) -> str | None:
    """The last formula, in a list with those that only `,`, `and` or `or` joins to it where they give the same name, or
    none, their values; None where there is none, or its sentence doubts and no verb stands right before it."""
    formulas = _formulas(text)
    if not formulas:
        return None
    start, _, last = formulas.pop()
    values = [last]
    while formulas and _LISTED.fullmatch(text, formulas[-1][1], start) and _name(formulas[-1][2]) == _name(last):
        start, _, value = formulas.pop()
        values.append(value)
    before = re.split(r"[.!?\u3002]\s|\n", text[max(0, start - _SENTENCE_CHARS) : start])[-1]
    if DOUBT.search(before) and not _VERB_BEFORE.search(before):
        return None
    return ", ".join(reversed(values))


def _name(formula: str) -> str:
    """`x` of `x = 3`."""
    return formula.partition("=")[0].strip() if "=" in formula else ""


def _formulas(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each pair of math delimiters (`$ $`, `$$ $$`, `\\( \\)`, `\\[ \\]`) with content."""
    opened: tuple[str, int, int] | None = None
    formulas = []
    for match in _MATH_MARK.finditer(text):
        mark = match[0]
        if opened is not None and mark == _CLOSING[opened[0]]:
            if content := text[opened[2] : match.start()].strip():
                formulas.append((opened[1], match.end(), content))
            opened = None
        elif opened is None and mark in _CLOSING:
            opened = (mark, match.start(), match.end())
    return formulas


def _with_unit(formula: str, behind: str) -> str:
    """`$5$ km` as `5 km`: a formula, with what stands behind it where that is a unit."""
    quantity = formula + behind.rstrip(" .")
    return quantity if read_quantity(quantity).dimension is not None else formula


def _without_marks(text: str) -> str:
    if not _formulas(text):
        return text
    return _MATH_MARK.sub(lambda mark: mark[0] if mark[0] in (r"\$", r"\\") else "", text)


def inside_delimiters(text: str) -> str:
    """`text` without math delimiters that enclose all of it, and without markdown stars and an ending full stop."""
    text = text.strip().rstrip(".").strip("*").strip() if text.strip().startswith("*") else text.strip()
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


def find_stated(text: str) -> str | None:
    """What follows the last `####`, `answer is` or `answer:` on its line, or None."""
    last = None
    for last in _STATED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    line = text[last.end() :].lstrip().partition("\n")[0]
    line = _NEXT_SENTENCE.split(line, maxsplit=1)[0].partition("I hope it is")[0].strip()
    stated = _THUS.split(line.rpartition(" is ")[2])[-1].lstrip(": ")
    formulas = _formulas(stated)
    if len(formulas) == 1:
        start, end, formula = formulas[0]
        if not DOUBT.search(line[: len(line) - len(stated) + start]):
            return _with_unit(formula, stated[end:])
    return inside_delimiters(_without_marks(stated)) or None


def _out_of_sentence(text: str, kind: str) -> str:
    """The value that a boxed or tagged sentence states; the text itself where it is no sentence.

    `The answer is 5`, `Answer $9$`, `the share is 13/28`; but `$3$ cm` is a value with its unit.
    """
    if kind not in ("math", "number") or len(text) > _SENTENCE_CHARS:
        return text
    plain = _TEXT_COMMAND.sub(r" \1 ", text) if "\\text" in text else text
    stated = find_stated(plain)
    if stated:
        return stated
    opening = _OPENING_WORD.match(plain)
    if opening is None:
        return text
    formulas = _formulas(_VERB.split(plain)[-1])
    if len(formulas) == 1 and not DOUBT.search(plain) and plain.rstrip(" .").endswith(("$", r"\)", r"\]")):
        return formulas[0][2]
    return _concluded(plain) or text


def _concluded(text: str) -> str | None:
    """The value that ends the last sentence: behind `=`, a verb such as `is`, or in bold."""
    line = text.rstrip()[-_SENTENCE_CHARS:].rpartition("\n")[2]
    match = _CONCLUSION.search(line)
    if match is None or line.endswith((r"\)", r"\]")) or (line.rstrip(" .").endswith("$") and line.count("$") % 2 == 0):
        return None
    if DOUBT.search(re.split(r"[.!?\u3002]\s", line[: match.start()])[-1]):
        return None
    if match["bold"]:
        return match["bold"]
    if line[match.start()] == "=" and _ONE_OF_SEVERAL.search(line[: match.start()]):
        return None
    name = _NAME_AT_END.search(line[: match.start()]) if line[match.start()] == "=" else None
    if name is None and line[match.start()] == "=" and _OPENING_WORD.search(line) is None:
        return None
    return (f"{name[1]}=" if name else "") + (match["value"] + (match["unit"] or "")).strip()


def _only_number_of_last_line(text: str) -> str | None:
    last_line = text.rstrip()[-_SENTENCE_CHARS:].rpartition("\n")[2]
    found = set() if DOUBT.search(last_line) else {match[0] for match in _NUMBER.finditer(last_line)}
    return found.pop() if len(found) == 1 else None


def _are_values(choices: Sequence[str] | None) -> bool:
    return any(char.isdigit() for choice in choices or () for char in str(choice))


def _only_letter_of_last_line(text: str) -> str | None:
    found = set(MARKED_LETTER.findall(text.rstrip().rpartition("\n")[2]))
    return found.pop() if len(found) == 1 else None


def _bare(text: str, kind: str) -> str | None:
    text = text.strip()
    if not text or len(text) > _BARE_CHARS or "\n" in text:
        return None
    if kind == "math" and len(_WORD.findall(text)) > 2:
        return None
    return inside_delimiters(text)
