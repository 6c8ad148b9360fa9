"""Units of answers: what stands behind a number, and whether two answers measure the same thing."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 400
"""A longer text is not searched for a unit."""

_TENTH = Fraction(1, 10)
_UNIT = {"unit": 1}
"""A unit without a name is a label (`5 units` = `5 cm`), unless it has a power or stands per something."""
_UNITS: dict[str, tuple[Fraction, dict[str, int]]] = {}
"""Name -> factor to the base unit, and powers of base units."""


def _add(names: str, factor: Fraction | int | str, **powers: int) -> None:
    for name in names.split():
        _UNITS[name] = (Fraction(factor), powers)


def _add_all() -> None:
    for prefix, spelled, power in (("", "", 0), ("k", "kilo", 3), ("c", "centi", -2), ("m", "milli", -3)):
        for factor, ending in ((Fraction(10) ** power, "er"), (Fraction(10) ** power, "re")):
            _add(f"{spelled}met{ending} {spelled}met{ending}s", factor, m=1)
            _add(f"{spelled}lit{ending} {spelled}lit{ending}s", factor / 1000, m=3)
        _add(f"{prefix}m", Fraction(10) ** power, m=1)
        _add(f"{prefix}g {spelled}gram {spelled}grams", Fraction(10) ** power, g=1)
        _add(f"{prefix}L {prefix}l", Fraction(10) ** power / 1000, m=3)
        _add(f"{prefix}s {spelled}second {spelled}seconds", Fraction(10) ** power, s=1)
    _add("dm decimeter decimeters", "1/10", m=1)
    _add("nm nanometer nanometers", _TENTH**9, m=1)
    _add("in inch inches", "0.0254", m=1)
    _add("ft foot feet", "0.3048", m=1)
    _add("yd yard yards", "0.9144", m=1)
    _add("mi mile miles", "1609.344", m=1)
    _add("lb lbs pound pounds", "453.59237", g=1)
    _add("oz ounce ounces", "28.349523125", g=1)
    _add("tonne tonnes", 10**6, g=1)
    _add("gallon gallons", "0.003785411784", m=3)
    _add("sec secs", 1, s=1)
    _add("min mins minute minutes", 60, s=1)
    _add("h hr hrs hour hours", 3600, s=1)
    _add("day days", 86400, s=1)
    _add("week weeks", 604800, s=1)
    _add("month months", 1, month=1)
    _add("year years", 12, month=1)
    _add("mph", Fraction("1609.344") / 3600, m=1, s=-1)
    _add("kmh kph kmph", Fraction(1000, 3600), m=1, s=-1)
    _add("deg degree degrees", 1, degree=1)
    _add("rad radian radians", 1, radian=1)
    for scale in "CFK":
        _add(f"scale{scale}", 1, **{f"degrees {scale}": 1})
    _add("dollar dollars USD usd", 1, dollar=1)
    _add("cent cents", "1/100", dollar=1)
    for names in ("euro euros EUR", "GBP", "yen JPY", "rupee rupees INR"):
        _add(names, 1, **{names: 1})
    _add("公斤 千克", 1000, g=1)
    _add("克", 1, g=1)
    _add("公里 千米", 1000, m=1)
    _add("米", 1, m=1)
    _add("厘米", "1/100", m=1)
    _add("percent", "1/100", percent=1)
    for name, powers in {
        "N": {"g": 1, "m": 1, "s": -2},
        "Pa": {"g": 1, "m": -1, "s": -2},
        "J": {"g": 1, "m": 2, "s": -2},
        "W": {"g": 1, "m": 2, "s": -3},
    }.items():
        for prefix, size in (("", 1000), ("k", 10**6), ("M", 10**9)):
            _add(prefix + name, size, **powers)
    for name, base in {"V": "volt", "A": "ampere", "Hz": "hertz", "mol": "mole", "K": "kelvin"}.items():
        _add(name, 1, **{base: 1})
        _add("k" + name, 1000, **{base: 1})
        _add("m" + name, "1/1000", **{base: 1})
    _add("MHz", 10**6, hertz=1)
    _add("newton newtons", 1000, g=1, m=1, s=-2)
    _add("joule joules", 1000, g=1, m=2, s=-2)
    _add("watt watts", 1000, g=1, m=2, s=-3)
    _add("volt volts", 1, volt=1)
    _add("ampere amperes amp amps", 1, ampere=1)


_add_all()
_add("unit units", 1, **_UNIT)
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_LABEL = re.compile(
    "and|or|nor|not|no|more|less|fewer|greater|than|at|least|most|to|plus|minus|times|over|under|by|of|if|when|where|"
    "with|without|for|is|are|was|equals|equal|approximately|about|half|halves|third|thirds|quarter|quarters|squared|"
    "cubed|square|cube|root|factorial|mod|modulo|base|only|otherwise|undefined|infinity|but|wait|per|maybe|perhaps|"
    "either|both|all|any|some|none|point|negative|positive|unless|except"
)
"""Words that change what a number says: they never make a label such as `apples`, which changes nothing."""

_WRAPPED = re.compile(
    r"\\(?:text|textnormal|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|rm)\s?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_BRACED = re.compile(r"(?<=[\d\s;,!])\{\s?([A-Za-z]{2,})\s?\}")
_DEGREE = re.compile(r"\s?\^\s?(?:\{\s?(?:\\circ|o)\s?\}|\\circ(?![A-Za-z])|o(?![A-Za-z]))|\s?\\degree(?![A-Za-z])")
_SPACE_BEFORE_WORD = re.compile(r"(?:\\[,;:! ]|~)+(?=\s*[A-Za-z])")
_TEMPERATURE = re.compile(r" degrees?\s?(C|F|K)(?![A-Za-z])")
_CURRENCY = {"$": "dollar", "€": "euro", "£": "GBP", "¥": "yen", "₹": "rupee"}
_CURRENCY_BEFORE = re.compile(r"\s*(-?)\s?(?:\\?(\$)|([€£¥₹]))\s?(?=[\d.\\-])")
_CURRENCY_AFTER = re.compile(r"\s?(?:\\?(\$)|([€£¥₹]))\s*$")
_PERCENT = re.compile(r"\\?%|\bper\s?cent\b")
_START = re.compile(r"(?<![^\W\d_]|\\)[^\W\d_]")
_SYMBOL = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_VALUE_END = re.compile(r"(?:[\d.)}\]]|\\pi|\\infty)\s*$")
_FACTOR = re.compile(r"([^\W\d_²³]+)(?:\s?\^\s?(?:\{\s?(-?\d)\s?\}|(\d))|\s?([²³]))?")
_LETTERS = re.compile(r"[A-Za-z](?: [A-Za-z])+")
"""`m g` may be a product of symbols."""
_PER = re.compile(r"(.*?)\s*(?:\bper\b|/)\s*(.+)")
_BETWEEN = re.compile(r"\s*(/|\bper\b|\\cdot|\*|-|\s)\s*")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A text taken apart into a value and its unit."""

    value: str
    """The text without its unit."""
    factor: Fraction = Fraction(1)
    """What one of the unit is in base units, times `multiple`."""
    multiple: int = 1
    """A million or the like that stands between value and unit."""
    dimension: tuple[tuple[str, int], ...] | None = None
    """Base units with their powers; None where the text has no unit, or one that is only a label (`apples`)."""
    has_unit: bool = False
    """Whether anything was taken off the text."""

    @property
    def is_percent(self) -> bool:
        """Whether it is written in percent."""
        return self.dimension == (("percent", 1),)

    @property
    def is_degrees(self) -> bool:
        """Whether it is an angle in degrees."""
        return self.dimension == (("degree", 1),)


def read_quantity(text: str) -> Quantity:
    """`5\\text{ cm}^2`, `\\$18`, `90^\\circ`, `50\\%`, `3 million people` -> value and unit.

    A unit of one letter counts only behind a space or inside a text command: `5m` may be a product.
    """
    if len(text) > MAX_CHARS:
        return Quantity(text)
    plain = _DEGREE.sub(" degree", _WRAPPED.sub(r" \1 ", text))
    plain = _SPACE_BEFORE_WORD.sub(" ", plain)
    plain = _TEMPERATURE.sub(lambda match: f" scale{match[1]}", plain)
    plain = _PERCENT.sub(" percent", _BRACED.sub(r" \1", plain)).rstrip(" .~")
    if match := _CURRENCY_BEFORE.match(plain):
        name = _CURRENCY[match[2] or match[3]]
        inner = read_quantity(match[1] + plain[match.end() :])
        powers = dict(inner.dimension or ())
        if all(power < 0 for power in powers.values()):
            of_money = tuple(sorted({**powers, _base_of(name): 1}.items()))
            return Quantity(inner.value, inner.factor, inner.multiple, of_money, has_unit=True)
        return Quantity(text)
    if match := _CURRENCY_AFTER.search(plain):
        if not _VALUE_END.search(plain[: match.start()]):
            return Quantity(text)
        return Quantity(
            plain[: match.start()], dimension=((_base_of(_CURRENCY[match[1] or match[2]]), 1),), has_unit=True
        )
    for start in _START.finditer(plain):
        value = plain[: start.start()]
        if not _VALUE_END.search(value):
            continue
        if _SYMBOL.search(value.rpartition("=")[2]):  # 3x m: letters are symbols here
            continue
        found = _unit(plain[start.start() :], is_apart=value[-1].isspace())
        if found is not None:
            multiple, factor, powers = found
            dimension = None if not powers else tuple(sorted(powers.items()))
            return Quantity(value.strip().rstrip("\\").strip(), multiple * factor, multiple, dimension, has_unit=True)
    return Quantity(text)


def _base_of(name: str) -> str:
    return next(iter(_UNITS[name][1]))


def _unit(text: str, *, is_apart: bool) -> tuple[int, Fraction, dict[str, int]] | None:
    """Multiple, factor and powers of what stands behind a number, the whole of it; no powers where it is a label."""
    text = text.strip()
    head, _, rest = text.partition(" ")
    if head in _MULTIPLES:
        inner = _unit(rest, is_apart=True) if rest.strip() else (1, Fraction(1), {})
        return None if inner is None else (inner[0] * _MULTIPLES[head], *inner[1:])
    power = {"square": 2, "sq": 2, "cubic": 3}.get(head.rstrip("."), 1)
    known = _known(rest if power > 1 else text, is_apart=is_apart)
    if known is not None:
        powers = {name: exponent * power for name, exponent in known[1].items()}
        return 1, known[0] ** power, {} if powers == _UNIT else powers
    if not is_apart and text.isascii():
        return None
    return (1, Fraction(1), {}) if _is_label(text) else _rate(text)


def _rate(text: str) -> tuple[int, Fraction, dict[str, int]] | None:
    """`words per minute`, `per day`: what is counted is a label, what it is counted by a unit."""
    match = _PER.fullmatch(text)
    if match is None or (match[1] and not _is_label(match[1])):
        return None
    known = _known(match[2], is_apart=True)
    return None if known is None else (1, 1 / known[0], {name: -power for name, power in known[1].items()})


def _known(text: str, *, is_apart: bool) -> tuple[Fraction, dict[str, int]] | None:
    powers: dict[str, int] = {}
    factor, sign, position = Fraction(1), 1, 0
    if _LETTERS.fullmatch(text):
        return None
    while True:
        match = _FACTOR.match(text, position)
        if match is None or match[1] not in _UNITS or (len(match[1]) == 1 and position == 0 and not is_apart):
            return None
        exponent = sign * int(match[2] or match[3] or {"²": 2, "³": 3}.get(match[4] or "", 1))
        scale, base = _UNITS[match[1]]
        factor *= scale**exponent
        for name, power in base.items():
            powers[name] = powers.get(name, 0) + power * exponent
        position = match.end()
        if not text[position:].strip(" ."):
            return factor, {name: power for name, power in powers.items() if power}
        between = _BETWEEN.match(text, position)
        if between is None:
            return None
        sign = -1 if between[1] in ("/", "per") else 1
        position = between.end()


def _is_label(text: str) -> bool:
    words = text.split()
    return len(words) <= 4 and all(
        re.fullmatch(r"[A-Za-z][a-z]{2,}[,.]?|[^\W\d_a-zA-Z]{1,6}", word)
        and word.strip(",.").isalpha()
        and _NO_LABEL.fullmatch(word.strip(",.").lower()) is None
        for word in words
    )
