"""What makes a chain unfit to learn from whatever its answer: loops, mixed languages, blindness, a leaked answer."""

import re
import unicodedata
from collections import Counter

from r1v_rl.scoring.format import has_format, with_prompt_think

_NGRAM = 8
_MIN_WORDS = 4 * _NGRAM
_SECOND_SCRIPT = 0.05
"""Share of a chain's letters in another script from which on it is mixed."""
_NEUTRAL = ("GREEK", "MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT", "FEMININE", "MASCULINE", "MICRO", "OHM")
"""First words of the names of letters that formulas use in every language."""
_ONE_LANGUAGE = {"CJK": "East Asian", "HIRAGANA": "East Asian", "KATAKANA": "East Asian", "HANGUL": "East Asian"}
_WORD = re.compile(r"\S+")
_LATIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
"""Not the names of points and variables, nor LaTeX's commands, which stand in texts of every language."""
_PICTURE = r"(?:image|picture|photo|figure|diagram|chart|graph|attachment)s?"
_SHOWN = r"(?:provided|given|attached|shown|visible|available)"
_BLIND = re.compile(
    r"\b(?:(?:can(?:'|’)?t|cannot|can not|unable to|not able to|don(?:'|’)t|do not) (?:actually |really )?"
    rf"(?:see|view|access|perceive|look at|have access to) (?:(?:the|this|that|any|an|a|your) )?{_PICTURE}"
    rf"|no {_PICTURE} (?:(?:is|was|has been) )?{_SHOWN}"
    rf"|{_PICTURE} (?:(?:is|was) not|isn't|wasn't) {_SHOWN}"
    r"|as an? (?:ai |large )?(?:text-based |text-only )?(?:language )?model)\b",
    re.IGNORECASE,
)
_KNOWN = r"(?:correct|reference|given|gold|provided|expected) (?:final )?answer"
_LEAK = re.compile(
    rf"\b(?:{_KNOWN} (?:is (?:given|known|stated|said)|says|states|was given)"
    rf"|(?:according to|match(?:es)?|agrees with|given) the {_KNOWN}"
    r"|the student(?:'s)?|student's (?:solution|answer)|(?:previous|original) (?:solution|attempt|answer))\b",
    re.IGNORECASE,
)


def degenerate(chain: str, *, opens_think: bool, question: str, max_repeated: float, is_revision: bool = False) -> str:
    """What is wrong with a chain, in words; nothing where it can be learned from.

    Args:
        chain: What follows the prompt.
        opens_think: Whether the prompt opened `<think>`.
        question: A script that the question has may stand in the chain too.
        max_repeated: Largest share of its words that may stand in a repeated run of eight.
        is_revision: Whether its author was told the answer, and must not speak of that.
    """
    if not has_format(chain, opened=opens_think):
        return "its form is not <think>...</think> and a boxed answer"
    text = with_prompt_think(chain, opens_think)
    if (share := repeated_frac(text)) > max_repeated:
        return f"{share:.0%} of it repeats itself"
    if languages := mixed_scripts(text, question):
        return f"it mixes languages: {languages}"
    if found := _BLIND.search(text):
        return f"it says that it sees no picture: {found.group()[:60]!r}"
    if is_revision and (found := _LEAK.search(text)):
        return f"it speaks of the answer that it was given: {found.group()[:60]!r}"
    return ""


def repeated_frac(text: str) -> float:
    """Share of the runs of eight words that stood in the text before; 0 for a short text."""
    words = _WORD.findall(text)
    if len(words) < _MIN_WORDS:
        return 0.0
    runs = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    return 1.0 - len(set(runs)) / len(runs)


def mixed_scripts(text: str, question: str = "") -> str:
    """The scripts of a text in several, with their shares; nothing where it keeps to one, or to the question's."""
    counts = _scripts(text)
    asked = set(_scripts(question))
    total = counts.total()
    large = {script: number for script, number in counts.items() if number > _SECOND_SCRIPT * total}
    if len(large) < 2 or set(large) <= asked:
        return ""
    return ", ".join(f"{script.title()} {number / total:.0%}" for script, number in sorted(large.items()))


def _scripts(text: str) -> Counter[str]:
    """Letters of each script; those of formulas and tags left out."""
    text = text.replace("<think>", "").replace("</think>", "")
    counts: Counter[str] = Counter()
    if latin := sum(len(word) for word in _LATIN_WORD.findall(text)):
        counts["LATIN"] = latin
    for char, number in Counter(text).items():
        if not char.isascii() and char.isalpha():
            script = unicodedata.name(char, "UNKNOWN").split()[0].split("-")[0]
            if script not in _NEUTRAL:
                counts[_ONE_LANGUAGE.get(script, script)] += number
    return counts
