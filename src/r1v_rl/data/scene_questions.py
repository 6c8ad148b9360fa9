"""Scenes of coloured, numbered shapes in a 3x3 grid, and questions about them that have one exact answer."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

COLORS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "square", "triangle")
DIGITS = tuple(range(1, 7))
CELLS = ("a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3")
NUM_CELLS = len(CELLS)
KINDS = ("count", "sum", "difference", "compare", "frequent")
KINDS_OF_TWO = ("count", "sum", "difference", "compare")
EMPTY = "."


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    color: str
    shape: str
    digit: int

    @property
    def word(self) -> str:
        """The object as one written word: `red-circle-3`."""
        return f"{self.color}-{self.shape}-{self.digit}"


Scene = tuple[Thing | None, ...]
"""Nine cells in raster order; None is an empty cell."""


@dataclass(frozen=True, slots=True)
class Filter:
    """The objects of one colour or of one shape."""

    color: str | None = None
    shape: str | None = None

    def matches(self, thing: Thing) -> bool:
        return self.color in (None, thing.color) and self.shape in (None, thing.shape)

    @property
    def noun(self) -> str:
        """Its name in a question: `red shapes`, `circles`."""
        return f"{self.color + ' ' if self.color else ''}{self.shape or 'shape'}s"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer; `filters` and `attribute` are what a solution needs beside the scenes."""

    kind: str
    template: str
    text: str
    answer: str
    filters: tuple[Filter, ...] = ()
    attribute: str = ""


ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "number": DIGITS}
_SIMPLE = tuple([Filter(color=c) for c in COLORS] + [Filter(shape=s) for s in SHAPES])
_PAIRS = tuple(
    (a, b) for a in _SIMPLE for b in _SIMPLE if a != b and (a.color is None) == (b.color is None)
)  # both by colour or both by shape, so that no object is in both

_TEMPLATES = {
    ("count", 1): "How many {A} are there?",
    ("count", 2): "How many {A} are there in both pictures together?",
    ("sum", 1): "What is the sum of the numbers on the {A}?",
    ("sum", 2): "What is the sum of the numbers on the {A} in both pictures together?",
    ("difference", 1): "What is the difference between the sum of the numbers on the {A} and on the {B}?",
    ("difference", 2): "What is the difference between the sums of the numbers on the {A} in the two pictures?",
    ("compare", 1): "Are there more {A} than {B}? Answer more, fewer or equal.",
    ("compare", 2): "Which picture has more {A}? Answer first, second or equal.",
}


def written_scene(scene: Scene) -> str:
    """The scene as nine words in raster order, one per cell: the canonical text that hashes and prompts share."""
    return " ".join(thing.word if thing else EMPTY for thing in scene)


def positioned_scene(scene: Scene) -> str:
    """The scene as it stands in a text-only prompt: each cell's word begins with the cell's name, `a1-red-circle-3`."""
    return " ".join(f"{name}-{thing.word if thing else 'empty'}" for name, thing in zip(CELLS, scene, strict=True))


def parse_scene(text: str) -> Scene:
    """The scene that `written_scene` wrote."""
    cells: list[Thing | None] = []
    for word in text.split():
        if word == EMPTY:
            cells.append(None)
        else:
            color, shape, digit = word.split("-")
            cells.append(Thing(color, shape, int(digit)))
    assert len(cells) == NUM_CELLS, text
    return tuple(cells)


def split_of(scene: Scene) -> str:
    """`train` or `heldout`, by the sha256 of the scene's text: one scene in ten is held out, whatever the seed."""
    digest = hashlib.sha256(written_scene(scene).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def sample_scene(rng: Random, *, num_objects: int, split: str) -> Scene:
    """A random scene of the split. Colours and shapes have random weights, so that large counts are not rare."""
    while True:
        color_weights = [rng.expovariate(1.0) for _ in COLORS]
        shape_weights = [rng.expovariate(1.0) for _ in SHAPES]
        digits = rng.sample(DIGITS, rng.randint(2, 5))
        cells: list[Thing | None] = [None] * NUM_CELLS
        for cell in rng.sample(range(NUM_CELLS), num_objects):
            color = rng.choices(COLORS, color_weights)[0]
            shape = rng.choices(SHAPES, shape_weights)[0]
            cells[cell] = Thing(color, shape, rng.choice(digits))
        scene = tuple(cells)
        if split_of(scene) == split:
            return scene


def attribute_of(thing: Thing, attribute: str) -> str:
    """The object's colour, shape or number, as written in an answer."""
    return str({"color": thing.color, "shape": thing.shape, "number": thing.digit}[attribute])


def solve(kind: str, scenes: tuple[Scene, ...], filters: tuple[Filter, ...], attribute: str) -> str | None:
    """The exact answer, or None where there is none (no single most frequent value)."""
    things = [[t for t in scene if t] for scene in scenes]
    if kind == "frequent":
        ranked = Counter(attribute_of(t, attribute) for side in things for t in side).most_common(2)
        return None if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]
    sides = (
        [[t for t in things[0] if f.matches(t)] for f in filters]
        if len(scenes) == 1
        else [[t for t in picture if filters[0].matches(t)] for picture in things]
    )
    counts, sums = [len(s) for s in sides], [sum(t.digit for t in s) for s in sides]
    if kind == "count":
        return str(sum(counts))
    if kind == "sum":
        return str(sum(sums))
    if kind == "difference":
        return str(abs(sums[0] - sums[1]))
    words = ("more", "fewer", "equal") if len(scenes) == 1 else ("first", "second", "equal")
    return words[0] if counts[0] > counts[1] else words[1] if counts[0] < counts[1] else words[2]


def _acceptance(kind: str, num_scenes: int, most: int, rng: Random) -> Callable[[str], bool]:
    """What the answer must be, drawn before the scene is: evens the answers out, so that guessing pays little."""
    if kind == "count":
        target = str(rng.randint(0, min(5, most)))
        return lambda answer: answer == target
    if kind == "compare":
        words = ("more", "fewer", "equal") if num_scenes == 1 else ("first", "second", "equal")
        target = rng.choice(words)
        return lambda answer: answer == target
    if kind in ("sum", "difference") and rng.random() < 0.95:
        return lambda answer: answer != "0"
    return lambda answer: True


def sample_question(
    kind: str, num_scenes: int, rng: Random, *, split: str, num_objects: tuple[int, int] | None = None
) -> tuple[tuple[Scene, ...], Question]:
    """Scenes of the split and a question about them whose answer is unique."""
    low, high = num_objects or ((3, 6) if num_scenes == 1 else (2, 4))
    accept = _acceptance(kind, num_scenes, num_scenes * high, rng)
    attribute, target = "", None
    filters: tuple[Filter, ...] = ()
    if kind == "frequent":
        attribute = rng.choice(list(ATTRIBUTES))
        target = str(rng.choice(ATTRIBUTES[attribute]))
        template = text = f"Which {attribute} is the most frequent?"
    while True:
        scenes = tuple(sample_scene(rng, num_objects=rng.randint(low, high), split=split) for _ in range(num_scenes))
        if kind in ("difference", "compare") and num_scenes == 1:
            filters = rng.choice(_PAIRS)
        elif kind != "frequent":
            filters = (rng.choice(_SIMPLE),)
        answer = solve(kind, scenes, filters, attribute)
        if answer is not None and accept(answer) and target in (None, answer):
            break
    if kind != "frequent":
        template = _TEMPLATES[kind, num_scenes]
        text = template.format(**{name: f.noun for name, f in zip("AB", filters, strict=False)})
    return scenes, Question(kind, template, text, answer, filters, attribute)
