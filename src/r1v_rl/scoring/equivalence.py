"""Whether two formulas are equal, by math-verify and sympy. Imported only inside a worker process: any call may hang
or die.

No text of a model reaches `eval`, `sympify` or `parse_expr` from here; LaTeX is read by the ANTLR grammar of
latex2sympy2_extended, whose lexer lets only digits, a point and an exponent through to sympy's number parser.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

from latex2sympy2_extended import NormalizationConfig, is_expr_of_only_symbols, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Float, Number
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from r1v_rl.scoring.answers import plain_math

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its warning that no timeout is set: ours is a SIGKILL

_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_RELATION = re.compile(r"(?<![<>!\\:])=(?!=)|\\approx(?![a-zA-Z])|\\[{}]|[{}()\[\]]")
_OTHER_RELATION = re.compile(r"[<>,;]|\\(?:le|ge|leq|geq|ne|neq|in|lt|gt|equiv|sim|pm|begin|mapsto|to)(?![a-zA-Z])")
_BASE = re.compile(r"\d\s?_\s?(?:\{\s?(?P<braced>\d+)\s?\}|(?P<bare>\d+))$")
_CURRENCY = re.compile(r"^[€£¥₹]\s?")
_MIXED = re.compile(r"(?<![\d.}^_])(\d+)\s?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\s)(\d+)/(\d+))$")


@dataclass(frozen=True)
class Unreadable(Exception):
    """Raised where one side cannot be parsed."""

    side: str
    """`gold` or `answer`."""


def read_formula(text: str) -> Any:
    """The sympy expression of a formula, the whole of it.

    Raises:
        ValueError: If it does not parse.
    """
    latex = _CURRENCY.sub("", plain_math(text)).replace(r"\langle", "(").replace(r"\rangle", ")")
    latex = _MIXED.sub(lambda m: rf"({m[1]}+\frac{{{m[2] or m[4]}}}{{{m[3] or m[5]}}})", latex)
    latex = normalize_latex(latex, config=_NORMALISATION)
    if not latex:
        raise ValueError("empty")
    try:
        expression = latex2sympy(
            latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
        )
    except Exception as error:
        raise ValueError("not a formula") from error
    if expression is None:
        raise ValueError("not a formula")
    return expression


def same_value(gold: str, answer: str) -> bool:
    """Whether `answer` states the value, set, equation or expression that `gold` does.

    Raises:
        Unreadable: If one of them cannot be parsed.
    """
    try:
        gold_expression = read_formula(gold)
    except ValueError as error:
        raise Unreadable("gold") from error
    if _number_base(gold) != _number_base(answer) or _are_tuple_and_set(gold, answer):
        return False
    exact, rounded = split_chain(plain_math(answer))
    is_chain = len(exact) + len(rounded) > 1 and all(exact) and all(rounded)
    if not is_chain or len(split_chain(plain_math(gold))[0]) > 1 or _OTHER_RELATION.search(answer):
        return _equal(gold_expression, _read_answer(answer), allow_rounding="%" in gold + answer)
    return _chain_states(gold_expression, exact, rounded)


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


def _read_answer(text: str) -> Any:
    try:
        return read_formula(text)
    except ValueError as error:
        raise Unreadable("answer") from error


def _equal(gold: Any, answer: Any, *, allow_rounding: bool = False) -> bool:
    if not verify(gold, answer, float_rounding=6, numeric_precision=15, strict=True, timeout_seconds=None):
        return False
    return allow_rounding or not _numbers_apart(gold, answer)


def _numbers_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers that math-verify calls equal differ in their significant digits: it rounds to 6 decimals, and
    drops what is under 1e-15."""
    if not (isinstance(gold, Basic) and isinstance(answer, Basic) and _is_number(gold) and _is_number(answer)):
        return False
    try:
        a, b = gold.doit().evalf(30), answer.doit().evalf(30)
        difference = (gold.doit() - answer.doit()).evalf(30)
        scale = max(abs(a), abs(b))
        if scale == 0 or not scale.is_finite:
            return False
        limit = 1e-6 if gold.has(Float) or answer.has(Float) else 1e-12
        return bool(abs(difference) > limit * scale)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def _is_number(expression: Basic) -> bool:
    return getattr(expression, "is_number", False) is True and not isinstance(expression, Relational)


def _chain_states(gold: Any, exact: list[str], rounded: list[str]) -> bool:
    """Whether a chain such as `x = 2 + 3 = 5` or `\\pi \\approx 3.14` states `gold`.

    A chain that begins with a name states its last exact term. One that ends with a name (`5 = x`) states its first.
    In any other every exact term must be the gold, so that `1 = 2 = 5` does not state 5. A rounded term counts where
    it is the rounding of the exact one, or of a name.
    """
    is_named = _is_name(exact[0])
    if is_named and len(exact) > 1:
        states = _equal(gold, _read_answer(exact[-1]))
    elif not is_named and len(exact) == 2 and _is_name(exact[1]):
        states = _equal(gold, _read_answer(exact[0]))
    else:
        states = all(_equal(gold, _read_answer(term)) for term in exact)
    if states or not rounded:
        return states
    value = _read_answer(rounded[-1])
    return _equal(gold, value) and (
        (is_named and len(exact) == 1) or _rounds_to(_read_answer(exact[-1]), rounded[-1], value)
    )


def _is_name(text: str) -> bool:
    """Whether a term is a symbol, a function of symbols or a word: something a value is given to."""
    if re.search(r"\d", re.sub(r"_\s?(?:\{[^{}]*\}|\w)", "", text)):
        return False
    try:
        expression = read_formula(text)
    except ValueError:
        return bool(re.search("[A-Za-z]", text))
    if isinstance(expression, AppliedUndef):
        return True
    if isinstance(expression, Number) or _is_number(expression):
        return False
    inner = expression.args[0] if type(expression).__name__ == "Abs" else expression
    return isinstance(inner, AppliedUndef) or bool(is_expr_of_only_symbols(inner))


def _rounds_to(exact: Any, rounded_text: str, rounded: Any) -> bool:
    decimals = len(rounded_text.strip().partition(".")[2])
    try:
        return bool(abs((exact - rounded).evalf(20)) <= 0.5 * 10.0**-decimals)
    except (TypeError, ValueError, ArithmeticError):
        return False


def _number_base(text: str) -> str | None:
    match = _BASE.search(plain_math(text).strip())
    return None if match is None else match["braced"] or match["bare"]


def _are_tuple_and_set(gold: str, answer: str) -> bool:
    """Whether one is written `(a, b)` and the other `{a, b}`: math-verify takes the first for an open interval and then
    for a set."""
    kinds = {_bracket(gold), _bracket(answer)}
    return kinds == {"(", "{"}


def _bracket(text: str) -> str:
    text = plain_math(text)
    if "," not in text:
        return ""
    if text.startswith("(") and text.endswith(")"):
        return "("
    return "{" if text.startswith((r"\{", "{")) and text.endswith("}") else ""
