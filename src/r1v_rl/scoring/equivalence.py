"""Whether two formulas are equal, by math-verify and sympy. Imported only inside a worker process: any call may hang
or die.

No text of a model reaches `eval`, `sympify` or `parse_expr` from here; LaTeX is read by the ANTLR grammar of
latex2sympy2_extended, whose lexer lets only digits, a point and an exponent through to sympy's number parser.
"""

import contextlib
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mpmath
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended import NormalizationConfig, is_expr_of_only_symbols, normalize_latex
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, Float, Number, Rational, nan
from sympy import pi as PI
from sympy.core.cache import clear_cache
from sympy.core.function import AppliedUndef
from sympy.core.random import seed
from sympy.core.relational import Relational

from r1v_rl.scoring.answers import compared_factors, plain_math, units_conflict
from r1v_rl.scoring.exact import read_number
from r1v_rl.scoring.prose import DOUBT
from r1v_rl.scoring.statements import as_list, assignments, entries, split_chain
from r1v_rl.scoring.units import Quantity, read_quantity

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its warning that no timeout is set: ours is a SIGKILL

_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_OTHER_RELATION = re.compile(r"[<>,;]|\\(?:le|ge|leq|geq|ne|neq|in|lt|gt|equiv|sim|pm|begin|mapsto|to)(?![a-zA-Z])")
_BASE = re.compile(r"\d\s?_\s?(?:\{\s?(?P<braced>\d+)\s?\}|(?P<bare>\d+))$")
_REWRITTEN = (
    (re.compile(r"^\\approx(?![a-zA-Z])\s?"), ""),
    (re.compile(r"^\\?\$|^[€£¥₹]\s?"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\q?quad"), " "),
    (re.compile(r"\[?\s?\\begin\{array\}\s?\{[clr| ]*\}"), r"\\begin{bmatrix}"),
    (re.compile(r"\\end\{array\}\s?\]?"), r"\\end{bmatrix}"),
)
"""Notation that the grammar does not read, and the same in notation that it reads."""
_OUTWARD = re.compile(r"([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])")
_COLUMN = re.compile(
    r"\\begin\{[pb]?matrix\}((?:[^&\\]|\\(?!end|\\))*(?:\\\\(?:[^&\\]|\\(?!end|\\))*)*)\\end\{[pb]?matrix\}"
)
_INEQUALITY = re.compile(r"<=?|>=?|\\(?:leq?|geq?|lt|gt|leqslant|geqslant)(?![a-zA-Z])")
_MIXED = re.compile(r"(?<![\d.}^_])(\d+)\s?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\s)(\d+)/(\d+))$")


@dataclass(frozen=True)
class Unreadable(Exception):
    """Raised where one side cannot be parsed."""

    side: str
    """`gold` or `answer`."""


@lru_cache(maxsize=512)
def read_formula(text: str) -> Any:
    """The sympy expression of a formula, the whole of it.

    Raises:
        ValueError: If it does not parse.
    """
    latex = plain_math(text)
    for pattern, replacement in _REWRITTEN:
        latex = pattern.sub(replacement, latex)
    latex = _outward_interval(latex)
    latex = _MIXED.sub(lambda m: rf"({m[1]}+\frac{{{m[2] or m[4]}}}{{{m[3] or m[5]}}})", latex)
    latex = normalize_latex(latex, config=_NORMALISATION)
    if not latex:
        raise ValueError("empty")
    try:
        expression = _parsed(latex)
    except Exception as error:
        raise ValueError("not a formula") from error
    if expression is None:
        raise ValueError("not a formula")
    return expression


class _Reader(_Latex2Sympy):
    """latex2sympy with the choice of how far its parser looks around."""

    def __init__(self, latex: str, mode: int):
        super().__init__(is_real=not should_treat_as_complex(latex), convert_degrees=False)
        self._mode = mode

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self._mode
        return parser


def _parsed(latex: str) -> Any:
    """Read without context first, and with all of it where that fails: ANTLR's two stages, which agree where both read.

    On 3,500 answers the first alone took 3 s and the second 27 s; it failed on 104 of them, and none was read another
    way.
    """
    with contextlib.suppress(Exception):
        return _Reader(latex, PredictionMode.SLL).parse(latex)
    return _Reader(latex, PredictionMode.LL).parse(latex)


def forget() -> None:
    """Bring sympy back to the state of a fresh process, so that what comes next depends on its inputs alone.

    Sympy draws random numbers where it looks for zeros and in the order in which it deduces assumptions, and its
    caches hold expressions with what was deduced of them for an earlier answer.
    """
    clear_cache()
    read_formula.cache_clear()
    seed(0)
    mpmath.mp.prec = 53


def same_value(gold: str, answer: str) -> bool:
    """Whether `answer` states the value, set, equation or expression that `gold` does, in units that agree.

    Where only one of them has a unit, the other is taken to be in it; the letters of a unit may also be factors of a
    product, and the formulas are compared as they stand first.

    Raises:
        Unreadable: If one of them cannot be parsed.
    """
    gold, answer = as_list(plain_math(gold)), as_list(plain_math(answer))
    ordered = _in_order(gold, answer)
    if ordered is not None:
        return len(ordered[0]) == len(ordered[1]) and all(map(same_value, *ordered))
    gold_quantity, answer_quantity = read_quantity(gold), read_quantity(answer)
    if not (gold_quantity.has_unit or answer_quantity.has_unit):
        return _same_formula(gold, answer)
    with contextlib.suppress(Unreadable):
        if _same_formula(gold, answer):
            return True
    return not units_conflict(gold_quantity, answer_quantity) and _same_quantity(gold_quantity, answer_quantity)


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    gold_number = read_number(gold.value)
    size = None if gold_number is None else gold_number.fraction()
    factors = compared_factors(gold, answer, None if size is None else abs(size))
    if gold.is_degrees != answer.is_degrees and r"\pi" in (answer if gold.is_degrees else gold).value:
        in_degrees, other = (gold.value, answer.value) if gold.is_degrees else (answer.value, gold.value)
        return _equal(_read_answer(in_degrees) * PI / 180, _read_answer(other))
    if factors[0] == factors[1]:
        return _same_formula(gold.value, answer.value)
    scales = [Rational(factor.numerator, factor.denominator) for factor in factors]
    expressions = [_read(gold.value, "gold"), _read(answer.value, "answer")]
    if not all(isinstance(expression, Expr) for expression in expressions):
        return False
    return _equal(expressions[0] * scales[0], expressions[1] * scales[1])


def _in_order(gold: str, answer: str) -> tuple[list[str], list[str]] | None:
    """The values of both where one gives them to names and the other lists them alone, which keeps their order.

    A tuple that is the gold lists the values of x, y and z in this order, and of other names in that of the answer.
    """
    if "=" not in answer and (values := assignments(gold)):
        return list(values.values()), entries(_as_tuple(answer, _COLUMN.fullmatch(answer)))[1]
    if "=" not in gold and (values := assignments(answer)):
        is_tuple, parts = entries(gold)
        if is_tuple:
            return parts, [values[name] for name in (sorted(values) if values.keys() <= set("xyz") else values)]
    return None


def _same_formula(gold: str, answer: str) -> bool:
    gold_expression = _read(gold, "gold")
    if _number_base(gold) != _number_base(answer) or _are_tuple_and_set(gold, answer):
        return False
    exact, rounded = split_chain(answer)
    is_chain = len(exact) + len(rounded) > 1 and all(exact) and all(rounded)
    if not is_chain or len(split_chain(gold)[0]) > 1 or _OTHER_RELATION.search(answer):
        column = _COLUMN.fullmatch(gold.strip()), _COLUMN.fullmatch(answer.strip())
        if (column[0] is None) != (column[1] is None):  # a column vector and a tuple
            gold, answer = (_as_tuple(text, match) for text, match in zip((gold, answer), column, strict=True))
            return _equal(_read(gold, "gold"), _read(answer, "answer"))
        return _equal(gold_expression, _read(answer, "answer"), allows_solved=_is_solved(answer))
    return _chain_states(gold_expression, exact, rounded)


def _read(text: str, side: str) -> Any:
    try:
        return read_formula(text)
    except ValueError as error:
        raise Unreadable(side) from error


def _read_answer(text: str) -> Any:
    return _read(text, "answer")


def _equal(gold: Any, answer: Any, *, allows_solved: bool = False) -> bool:
    """Args:
    allows_solved: Whether an inequality may answer a gold that is an interval.
    """
    options = {"float_rounding": 6, "numeric_precision": 15, "strict": True, "timeout_seconds": None}
    if not verify(gold, answer, allow_set_relation_comp=allows_solved, **options):
        return False
    return not _numbers_apart(gold, answer)


def _is_solved(text: str) -> bool:
    """Whether a text is an inequality of one bare name with numbers (`-2 \\le x < 7`), which states an interval.

    `2x+1>7` states the interval of its solutions only to one who solves it: it may be the question itself.
    """
    terms = [term.strip() for term in _INEQUALITY.split(plain_math(text))]
    names = [term for term in terms if re.fullmatch(r"[A-Za-z]", term)]
    others = [re.sub(r"\\(?:frac|sqrt|pi|infty)(?![A-Za-z])", "", term) for term in terms if term not in names]
    return len(terms) in (2, 3) and len(names) == 1 and not any(re.search("[A-Za-z]", term) for term in others)


def _outward_interval(text: str) -> str:
    """`]1,2[` as `(1,2)`: a bracket that turns its back on the numbers leaves the end out."""
    match = _OUTWARD.fullmatch(text.strip())
    if match is None or (match[1] == "[" and match[3] == "]"):
        return text
    return ("(" if match[1] == "]" else "[") + match[2].replace(";", ",") + (")" if match[3] == "[" else "]")


def _as_tuple(text: str, column: re.Match[str] | None) -> str:
    if column is None:
        return text
    return "(" + ",".join(entry for entry in column[1].replace(r"\\", "&").split("&") if entry.strip()) + ")"


def _numbers_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers that math-verify calls equal differ in their significant digits: it rounds to 6 decimals, and
    drops what is under 1e-15."""
    if not (isinstance(gold, Basic) and isinstance(answer, Basic) and _is_number(gold) and _is_number(answer)):
        return False
    try:
        a, b = gold.doit().evalf(30), answer.doit().evalf(30)
        if a.is_finite is not True or b.is_finite is not True:  # infinity is near no number, and nan is nothing
            return bool(a != b) or a is nan
        scale = max(abs(a), abs(b))
        if scale == 0:
            return False
        difference = (gold.doit() - answer.doit()).evalf(30)
        limit = 1e-6 if gold.has(Float) or answer.has(Float) else 1e-12
        return bool(abs(difference) > limit * scale)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def _is_number(expression: Basic) -> bool:
    return getattr(expression, "is_number", False) is True and not isinstance(expression, Relational)


def _chain_states(gold: Any, exact: list[str], rounded: list[str]) -> bool:
    """Whether a chain such as `x = 2 + 3 = 5` or `\\pi \\approx 3.14` states `gold`.

    A chain that begins with a name states its last exact term, and nothing where a term ends with that name again: that
    is a statement of its own. One that ends with a name (`5 = x`) states its first. In any other every exact term must
    be the gold, so that `1 = 2 = 5` does not state 5. A rounded term counts where it is the rounding of the exact one,
    or of a name.
    """
    if any(map(DOUBT.search, (*exact, *rounded))):
        return False
    is_named = _is_name(exact[0])
    if is_named and any(term.endswith(exact[0]) for term in (*exact[1:], *rounded)):
        return False
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
