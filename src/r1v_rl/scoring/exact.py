"""Plain numbers compared exactly, in microseconds and in bounded memory, without sympy."""

import re
from dataclasses import dataclass
from fractions import Fraction

_MAX_CHARS = 400
_MAX_EXPONENT = 400
"""Beyond it a number is compared digit by digit only: 10**exponent is never built."""

_INTEGER = r"(?:[1-9]\d{0,2}(?:(?:(?:,\\!|\\!,|\{,\}|\\,)\s?|,)\d{3})++|\d++)"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s?(?=\.?\d)(?P<whole>{_INTEGER})?+(?:\.(?P<part>\d*+))?+(?:[eE](?P<exp>[+-]?\d{{1,18}}))?+"
    r"(?:\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?(?:\{\s?(?P<ten>[+-]?\d{1,18})\s?\}|(?P<ten1>\d)))?+"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[+-]?)\s?10\s?\^\s?(?:\{\s?(?P<ten>[+-]?\d{1,18})\s?\}|(?P<ten1>\d))")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s?(?:(?P<whole>\d++)\s?(?=\\|\d))??"
    r"(?:(?P<a>\d++)\s?/\s?(?P<b>\d++)|\\frac\s?\{\s?(?P<c>-?\d++)\s?\}\s?\{\s?(?P<d>\d++)\s?\}|\\frac\s?(?P<e>\d)\s?(?P<f>\d))"
)
_SEPARATOR = re.compile(r"[^\d]")


@dataclass(frozen=True, slots=True)
class ExactNumber:
    """A number as it was written: `digits * 10**exponent / denominator`, digits without trailing zeros."""

    digits: str
    """With its sign; "0" is zero."""
    exponent: int
    denominator: int = 1
    is_decimal: bool = False
    """Whether it was written with a decimal point, so that it may be a rounded value."""

    def fraction(self) -> Fraction | None:
        """The value, or None where building it would take a number of more than about 800 digits."""
        if abs(self.exponent) > _MAX_EXPONENT:
            return None
        return Fraction(int(self.digits)) * Fraction(10) ** self.exponent / self.denominator


def read_number(text: str) -> ExactNumber | None:
    """The plain number that `text` is, the whole of it, or None: `-1,234.50`, `1.5e-2`, `6\\times10^{23}`, `3/4`,
    `2\\frac{1}{2}`.

    One pass of regular expressions that cannot backtrack; a text over 400 characters is not looked at.
    """
    text = text.strip()
    if not text or len(text) > _MAX_CHARS or not text.isascii():
        return None
    if match := _FRACTION.fullmatch(text):
        return _from_fraction(match)
    if match := _POWER_OF_TEN.fullmatch(text):
        return _canonical(match["sign"], "1", int(match["ten"] or match["ten1"]), is_decimal=False)
    if match := _DECIMAL.fullmatch(text):
        part = match["part"] or ""
        exponent = int(match["exp"] or 0) + int(match["ten"] or match["ten1"] or 0) - len(part)
        return _canonical(
            match["sign"], _SEPARATOR.sub("", match["whole"] or "") + part, exponent, is_decimal=bool(part)
        )
    return None


def same_number(
    gold: ExactNumber, answer: ExactNumber, factors: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))
) -> bool:
    """Whether the two are equal: exactly, or, where one is a decimal, to 6 decimals and 6 significant digits.

    Both conditions together accept 0.333333 for 1/3 and refuse 0.00000031 for 0.00000025, which agree to 6 decimals.

    Args:
        factors: What the two are multiplied with first: the sizes of their units.
    """
    are_scaled = factors[0] != factors[1]
    are_whole = gold.denominator == answer.denominator == 1 and not are_scaled
    if are_whole and (gold.digits, gold.exponent) == (answer.digits, answer.exponent):
        return True
    a, b = gold.fraction(), answer.fraction()
    if a is None or b is None:
        return False
    if are_scaled:
        a, b = a * factors[0], b * factors[1]
    if a == b:
        return True
    if not (gold.is_decimal or answer.is_decimal):
        return False
    is_close = abs(a - b) <= Fraction(1, 1_000_000) * max(abs(a), abs(b))
    return is_close and (are_scaled or abs(a - b) <= Fraction(1, 2_000_000))


def _from_fraction(match: re.Match[str]) -> ExactNumber | None:
    numerator = int(match["a"] or match["c"] or match["e"])
    denominator = int(match["b"] or match["d"] or match["f"])
    if denominator == 0:
        return None
    if match["whole"] is not None:
        if numerator < 0:
            return None
        numerator += int(match["whole"]) * denominator
    if match["sign"] == "-":
        numerator = -numerator
    value = Fraction(numerator, denominator)
    return (
        ExactNumber(str(value.numerator), 0, value.denominator) if value.denominator != 1 else _whole(value.numerator)
    )


def _whole(value: int) -> ExactNumber:
    return _canonical("-" if value < 0 else "", str(abs(value)), 0, is_decimal=False)


def _canonical(sign: str, digits: str, exponent: int, *, is_decimal: bool) -> ExactNumber:
    stripped = digits.lstrip("0")
    significant = stripped.rstrip("0")
    if not significant:
        return ExactNumber("0", 0, is_decimal=is_decimal)
    return ExactNumber(
        ("-" if sign == "-" else "") + significant, exponent + len(stripped) - len(significant), is_decimal=is_decimal
    )
