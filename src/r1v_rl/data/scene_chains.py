"""Worked answers to questions about scenes: careful walks over the cells, brief guesses, descriptions, look-ups."""

from collections import Counter
from random import Random

from r1v_rl.data.scene_questions import CELLS, Question, Scene, Thing, attribute_of

CELL_NAMES = (*CELLS, *[row + column for row in "def" for column in "123"])
"""a1..c3 are the first picture's cells in raster order, d1..f3 the second's."""
DESCRIBE = "Describe the picture."
EXPLAIN = "Explain."
CAREFUL_SHARE = ({3: 0.2, 4: 0.3, 5: 0.45, 6: 0.65}, {4: 0.2, 5: 0.3, 6: 0.4, 7: 0.5, 8: 0.65})
"""Share of careful chains by number of objects, for one scene and for two: a crowded picture gets a closer look."""


def _seen(name: str, thing: Thing | None) -> str:
    return f"{name} {thing.color} {thing.shape} {thing.digit}" if thing else f"{name} ."


def description(scenes: tuple[Scene, ...]) -> str:
    """Every cell by name, in order, with what is in it."""
    cells = [thing for scene in scenes for thing in scene]
    return " ".join(["Look", *map(_seen, CELL_NAMES, cells)])


class _Tally:
    """The running totals that a walk keeps, one for each colour (or shape, or number), whichever the question is about.

    Keeping them for every value, not only for the ones asked for, leaves one choice: which total to read at the end.
    """

    def __init__(self, question: Question):
        self.question = question
        self.adds_digits = question.kind in ("sum", "difference")
        self.attribute = question.attribute or ("color" if question.filters[0].color else "shape")
        self.totals: Counter[str] = Counter()
        self.leader = ""

    def after(self, thing: Thing) -> str:
        """What the walk says of an object: its value and that value's new total; the leader too, if one is sought."""
        value = attribute_of(thing, self.attribute)
        self.totals[value] += thing.digit if self.adds_digits else 1
        if self.question.kind != "frequent":
            return f"{value} {self.totals[value]}"
        if self.totals[value] > self.totals[self.leader]:
            self.leader = value
        return f"{value} {self.totals[value]} {self.leader} {self.totals[self.leader]}"

    def conclusion(self) -> str:
        """The totals that the question asks for."""
        wanted = [f.color or f.shape or "" for f in self.question.filters] or [self.leader]
        return " ".join(["total", *[f"{value} {self.totals[value]}" for value in wanted]])


def careful_walk(question: Question, scenes: tuple[Scene, ...]) -> str:
    """Every cell in order with its running total, then the totals asked for (by picture, where two are compared)."""
    tally, words, names = _Tally(question), [f"Look for {_Tally(question).attribute}"], iter(CELL_NAMES)
    apart = question.kind in ("difference", "compare")
    for number, scene in enumerate(scenes, start=1):
        for thing in scene:
            words.append(_seen(next(names), thing))
            if thing:
                words.append(tally.after(thing))
        if apart or number == len(scenes):
            words.append(tally.conclusion())
            tally.totals.clear()
    return " ".join(words)


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def careful_completion(question: Question, scenes: tuple[Scene, ...]) -> str:
    """A careful chain as it follows the `<think>` that the prompt opens."""
    return f"{careful_walk(question, scenes)}</think>\n{boxed(question.answer)}"


def brief_completion(question: Question) -> str:
    """A chain that only states a guess: the answer has to be known before anything is written."""
    return f"About {question.answer}</think>\n{boxed(question.answer)}"


def reasoned_completion(question: Question, scenes: tuple[Scene, ...], rng: Random, careful: bool | None = None) -> str:
    """A chain in one of the two styles; where `careful` is None it is drawn, careful more often in a crowded scene."""
    if careful is None:
        count = sum(thing is not None for scene in scenes for thing in scene)
        careful = rng.random() < CAREFUL_SHARE[len(scenes) - 1].get(count, 0.2)
    return careful_completion(question, scenes) if careful else brief_completion(question)


def look_up(scenes: tuple[Scene, ...], rng: Random) -> tuple[str, str]:
    """A small question about one cell or one object, and its answer."""
    cells = [thing for scene in scenes for thing in scene]
    cell = rng.randrange(len(cells))
    if rng.random() < 0.5:
        return f"What is at {CELL_NAMES[cell]}?", f"Look {_seen(CELL_NAMES[cell], cells[cell])}"
    looks = Counter((t.color, t.shape) for t in cells if t)
    unique = [t for t in cells if t and looks[t.color, t.shape] == 1]
    if unique:
        thing = rng.choice(unique)
        return f"What number is on the {thing.color} {thing.shape}?", boxed(str(thing.digit))
    thing = rng.choice([t for t in cells if t])
    return f"Where is a {thing.color} {thing.shape}?", f"Look {CELL_NAMES[cells.index(thing)]}"
