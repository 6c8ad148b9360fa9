"""An answer taken apart into its statements and their terms, without reading what a term says."""

import re

_RELATION = re.compile(r"(?<![<>!\\:])=(?!=)|\\approx(?![a-zA-Z])|\\[{}]|[{}()\[\]]")
_AND = re.compile(r",?\s?(?:\\text\s?\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z]))\s?")
_BRACKET_OR_COMMA = re.compile(r"(?<!\\),|\\[{}]|[{}()\[\]]")
_SPACE = r"(?:\\[ ,]|\s)*"
_WORD = r"(?i:or|and|then|so|but|hence|thus)"
_TEXT = r"\\(?:text|textnormal|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s?\{"
_SIGN = r"\\(?:lor|vee|land|wedge|q?quad|implies|iff|(?:Long)?(?:left)?[Rr]ightarrow|Leftrightarrow)(?![A-Za-z])|\\\\"
_CONNECTIVE = re.compile(
    rf"(?<=[^\s,;]){_SPACE}"
    rf"(?:(?:{_TEXT}[\s,;]*{_WORD}[\s,]*\}}|(?<![A-Za-z\\]){_WORD}(?![A-Za-z])|{_SIGN}){_SPACE})++"
    r"(?=(?:[^\s=<>,;{}()\[\]]|\s|\{[^{}]*\}|\([^()]*\))+(?<!\s)\s*=)"
    rf"|(?:(?<=[\d)}}]){_SPACE}(?:{_TEXT}[^{{}}]*\}}|(?<![A-Za-z\\])[A-Za-z]{{2,}}(?=\s)){_SPACE})"
    r"(?=[A-Za-z](?:_\w|_\{\w+\})?\s*=)"
)
"""What stands between a value and the next `name =`: a word or sign that joins statements, or any word."""


def as_list(latex: str) -> str:
    """`x=3 \\text{ or } x=-2` -> `x=3, x=-2`, which as one chain of equalities would state its last value alone."""
    if latex.count("=") < 2 or r"\begin" in latex:
        return latex
    return _CONNECTIVE.sub(", ", latex)


def split_chain(text: str) -> tuple[list[str], list[str]]:
    """The terms of a chain of equalities outside all brackets: those before the first `\\approx`, and the rest."""
    exact: list[str] = []
    rounded: list[str] = []
    terms, depth, start = exact, 0, 0
    for match in _RELATION.finditer(text):
        token = match[0]
        if token in ("=", r"\approx"):
            if depth == 0:
                terms.append(text[start : match.start()].strip())
                start = match.end()
                terms = rounded if token != "=" else terms
        else:
            depth += 1 if token[-1] in "{([" else -1
    terms.append(text[start:].strip())
    return exact, rounded


def entries(text: str) -> tuple[bool, list[str]]:
    """Whether a list stands in round brackets, and what stands between its commas or `and` outside all others."""
    text = _AND.sub(",", text.strip().replace(r"\langle", "(").replace(r"\rangle", ")"))
    is_tuple = text.startswith("(") and text.endswith(")")
    parts, depth, start, end = [], 0, int(is_tuple), len(text) - int(is_tuple)
    for match in _BRACKET_OR_COMMA.finditer(text, start, end):
        if match[0] != ",":
            depth += 1 if match[0][-1] in "{([" else -1
            if depth < 0:  # (1,2),(3,4)
                return False, [text]
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return is_tuple, [*parts, text[start:end].strip()]


def assignments(text: str) -> dict[str, str] | None:
    """Name -> value of `x=5, y=4`; None where a text is anything else, or gives one name two values (`x=1, x=2`).

    Names that differ in their index alone (`x_1=3, x_2=-2`) number the values of one name.
    """
    values: dict[str, str] = {}
    is_tuple, parts = entries(text)
    for part in parts:
        exact, rounded = split_chain(part)
        name = exact[0].partition("_")[0].strip()
        if rounded or len(exact) != 2 or not re.fullmatch(r"\\?[A-Za-z]+", name) or name in values or not exact[1]:
            return None
        values[name] = exact[1]
    return values if len(values) > 1 and not is_tuple else None
