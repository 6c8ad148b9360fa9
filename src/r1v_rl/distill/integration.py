"""How closely text and picture must be read together (VTIA), by rules on the words of the question; needs no model.

Patterns of Skywork R1V, section 2.3. High: "why" and "how" with what they presuppose, several objects and their
relations, terms of a science. Low: "what" and "where" about one thing that can be pointed at.
"""

import re
from dataclasses import dataclass

_CAUSAL = re.compile(r"\b(?:why|how(?! (?:many|much|old|long|far|tall|often)\b)|explain|prove|derive|justify)\b", re.I)
_PRESUPPOSED = re.compile(
    r"\b(?:because|since|given(?: that)?|if|when|after|before|still|again|stop(?:s|ped)?|continue[sd]?|"
    r"caus(?:e|es|ed|ing)|result(?:s|ed)? (?:in|from)|lead(?:s|ing)? to|in order to|assum(?:e|ing)|suppose)\b",
    re.I,
)
_RELATION = re.compile(
    r"\b(?:left|right|above|below|under|over|behind|between|next to|near(?:est)?|beside|inside|outside|around|"
    r"opposite|adjacent|touch(?:es|ing)?|in front of|than|both|each|together|more|fewer|less|larger|smaller|longer|"
    r"shorter|equal|same|difference|compare[ds]?|most|least|total|sum|average|ratio|respectively|parallel|perpendicular|"
    r"tangent|intersect(?:s|ing|ion)?)\b",
    re.I,
)
_TERM = re.compile(
    r"\b(?:angle|triangle|radius|diameter|circumference|perimeter|area|volume|axis|slope|function|equation|graph|vertex|"
    r"bisector|circle|probability|mean|median|percent(?:age)?|velocity|speed|acceleration|force|mass|energy|current|"
    r"voltage|circuit|resist(?:or|ance)|pressure|temperature|reaction|molecule|atom|ion|acid|base|cell|membrane|"
    r"chromosome|gene|species|ecosystem|enzyme|wave(?:length)?|frequency|lens|focal|pulley|lever|diagram|hypotenuse|"
    r"theorem|derivative|integral|vector|matrix|sequence|pattern|formula)s?\b|\$[^$]+\$|\\(?:frac|sqrt|angle|triangle)",
    re.I,
)
_IDENTIFY = re.compile(
    r"\b(?:what|which) (?:is|are|color|colour|kind|type|animal|object|name)\b|\bwhere (?:is|are)\b|"
    r"\bis there\b|\bwho (?:is|are)\b|\b(?:name|identify|read|find) the\b",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Integration:
    """The rule-based score of one question, in [0, 1], and the patterns that made it."""

    score: float
    reason: str


def integration_by_rules(question: str, num_images: int = 1) -> Integration:
    """The score: 0.3 to begin with, patterns of a kind counted up to three times, kept within [0, 1].

    Args:
        question: The conversation's text.
        num_images: Of the row, at least one: text alone has nothing to be read together with.
    """
    found = {
        "why or how": (_distinct(_CAUSAL, question), 0.2),
        "presupposition": (_distinct(_PRESUPPOSED, question), 0.1),
        "relations": (_distinct(_RELATION, question), 0.1),
        "domain terms": (_distinct(_TERM, question), 0.1),
        "further pictures": ([str(num_images)] * (num_images - 1), 0.1),
        "identification": (_distinct(_IDENTIFY, question), -0.2),
    }
    score = 0.3 + sum(min(3, len(words)) * weight for words, weight in found.values())
    reason = "; ".join(f"{name}: {', '.join(words[:3])}" for name, (words, _) in found.items() if words)
    return Integration(round(min(1.0, max(0.0, score)), 6), reason or "no pattern")


def _distinct(pattern: re.Pattern[str], text: str) -> list[str]:
    """What the pattern finds, each spelling once, in order."""
    return list(dict.fromkeys(match.group().lower().strip() for match in pattern.finditer(text)))
