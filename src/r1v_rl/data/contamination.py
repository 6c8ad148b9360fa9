"""Training rows that are test rows too: by their words (n-grams) and by their pictures, exact or nearly so.

Two rows with pictures overlap where a picture of theirs is the same one: their words alone say nothing, since many
visual sets ask one question of thousands of pictures. Where neither has a picture the words decide, and where one of
the two has, if they are many. A question that was reworded or translated, and a picture that was cropped, turned or
recoloured, is not found.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from r1v_rl.data.images import image_hash, load_image
from r1v_rl.data.rows import IMAGE_MARK, PROMPT_COLUMNS
from r1v_rl.errors import DataError
from r1v_rl.types import Example, ImageSource

NGRAM = 8
"""Words of an n-gram; a shorter text is one gram."""
MIN_SHARE = 0.7
"""Share of a test row's n-grams that a training row must hold; both numbers as in PaLM (arXiv:2204.02311, sec. 8)."""
COMMON = 3
"""An n-gram of more test rows than this is the set's own wording (an instruction, a template) and proves nothing."""

THUMBNAIL = 24
MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE = 16, 2.0
"""Levels of 255 by which thumbnails of one picture differ at most, in one cell and on average.

On NLVR, BlindTest, PuzzleVQA and MATH-Vision this sees through JPEG at quality 50, scaling by half and by 1.7 (at least
39 of 40 pictures each); of different pictures it takes 0.5 % of BlindTest's pairs for one, which differ by a hair.
"""
_ASPECT = 1.04
_BLOCK = 256

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+|[+\-*/^=<>|%!]")

LONG = 20
"""Words of a question that says so much that its text alone is the item, whatever its picture shows."""
_SHOWN = 5

Kind = Literal["text", "picture", "picture and text"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training row that is, or comes close to, a test row."""

    train_id: str
    test_id: str
    kind: Kind
    text_share: float
    """Share of the test row's n-grams that the training row holds; 1 for the same text."""
    exact_picture: bool
    """Whether a picture is the same pixel by pixel."""


@dataclass(frozen=True, slots=True)
class PictureHash:
    """What a picture is recognised by."""

    exact: str
    """sha256 of its RGB pixels: `data.images.image_hash`."""
    aspect: float
    """Width divided by height."""
    thumbnail: np.ndarray
    """uint8, (THUMBNAIL * THUMBNAIL * 3,): the mean colour of each cell of a grid laid over it."""


def picture_hash(source: ImageSource) -> PictureHash:
    """Exact and perceptual hash of a picture.

    Raises:
        DataError: If it cannot be read.
    """
    image = load_image(source)
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return PictureHash(image_hash(image), image.width / image.height, np.asarray(small).reshape(-1))


def is_near_picture(one: PictureHash, other: PictureHash) -> bool:
    """Whether both may be one picture, stored or scaled in different ways."""
    return bool(PictureIndex([one]).near(other))


class PictureIndex:
    """Pictures that others are looked up among."""

    def __init__(self, pictures: Sequence[PictureHash]):
        order = sorted(range(len(pictures)), key=lambda i: float(pictures[i].thumbnail.mean()))
        self._order = np.array(order, dtype=int)
        self._means = np.array([float(pictures[i].thumbnail.mean()) for i in order])
        self._aspects = np.array([pictures[i].aspect for i in order])
        self._thumbnails = np.array([pictures[i].thumbnail for i in order], dtype=np.int16)
        self._exact: dict[str, list[int]] = defaultdict(list)
        for index, picture in enumerate(pictures):
            self._exact[picture.exact].append(index)

    def same(self, picture: PictureHash) -> list[int]:
        """Indices of the pictures with the same pixels."""
        return self._exact.get(picture.exact, [])

    def near(self, picture: PictureHash) -> list[int]:
        """Indices of those that may be the same picture, the same pixels included, in order."""
        mean = float(picture.thumbnail.mean())
        first = np.searchsorted(self._means, mean - MAX_MEAN_DIFFERENCE)
        last = np.searchsorted(self._means, mean + MAX_MEAN_DIFFERENCE, side="right")
        found = set(self.same(picture))
        for start in range(int(first), int(last), _BLOCK):
            part = slice(start, min(start + _BLOCK, int(last)))
            differences = np.abs(self._thumbnails[part] - picture.thumbnail.astype(np.int16))
            ratio = self._aspects[part] / picture.aspect
            alike = (differences.max(axis=1) <= MAX_DIFFERENCE) & (differences.mean(axis=1) <= MAX_MEAN_DIFFERENCE)
            alike &= (ratio < _ASPECT) & (ratio > 1 / _ASPECT)
            found.update(self._order[part][alike].tolist())
        return sorted(found)


def find_overlaps(
    train: Sequence[Example], test: Sequence[Example], *, min_share: float = MIN_SHARE, progress: bool = True
) -> list[Overlap]:
    """Every pair of a training row and a test row that overlap, in the order of the training rows.

    Args:
        min_share: Share of a test row's n-grams that a training row must hold.
        progress: Show a bar while the pictures are read.

    Raises:
        DataError: If a picture cannot be read.
    """
    pictures_of_test = [(i, source) for i, example in enumerate(test) for source in example.images]
    hashes = hash_pictures([source for _, source in pictures_of_test], progress=progress, label="test pictures")
    index = PictureIndex(hashes)
    test_rows = [row for row, _ in pictures_of_test]
    questions = [words(question_text(example)) for example in test]
    texts = _TextIndex(questions)
    found: list[Overlap] = []
    for example, pictures in _with_pictures(train, wanted=bool(hashes), progress=progress):
        question = words(question_text(example))
        shares = texts.shares(question)
        near = {test_rows[i] for picture in pictures for i in index.near(picture)}
        exact = {test_rows[i] for picture in pictures for i in index.same(picture)}
        for row in sorted(near | {i for i, share in shares.items() if share >= min_share}):
            share, same_words = shares.get(row, 0.0), questions[row] == question
            num_with_pictures = bool(example.images) + bool(test[row].images)
            if row not in near and (num_with_pictures == 2 or (num_with_pictures and len(questions[row]) < LONG)):
                continue
            if row in near - exact and same_words and example.answer != test[row].answer:
                continue  # two pictures of a series that ask for what tells them apart
            is_asked = same_words or share >= min_share
            kind: Kind = "text" if row not in near else "picture and text" if is_asked else "picture"
            found.append(Overlap(example.id, test[row].id, kind, 1.0 if same_words else share, row in exact))
    return found


def find_duplicates(
    examples: Sequence[Example], *, min_share: float = 0.8, progress: bool = True
) -> list[tuple[int, int]]:
    """Pairs (later row, the earliest row that it repeats) within one set: the same words and pictures, or nearly so.

    Two texts are the same where each holds `min_share` of the other's n-grams; all pictures must match, in order. Rows
    with different answers are different questions, however alike they look ("... area?", "... perimeter?").
    """
    grams = [_grams(words(question_text(example))) for example in examples]
    hashes = hash_pictures([source for e in examples for source in e.images], progress=progress, label="pictures")
    group_of = _picture_groups(hashes)
    rows_by_gram: dict[tuple, list[int]] = defaultdict(list)
    position, repeated = 0, []
    for row, example in enumerate(examples):
        pictures = tuple(group_of[position : position + len(example.images)])
        position += len(example.images)
        shared = Counter(other for gram in grams[row] for other in rows_by_gram[pictures, gram])
        alike = (r for r, n in shared.items() if n >= min_share * max(len(grams[row]), len(grams[r])))
        same = (r for r in alike if examples[r].answer == example.answer)
        original = min(same, default=None)
        if original is not None:
            repeated.append((row, original))
            continue
        for gram in grams[row]:
            rows_by_gram[pictures, gram].append(row)
    return repeated


def check_contamination(train: Sequence[Example], test: Sequence[Example], action: str) -> str:
    """What a run says of training rows that are test rows too, in one line.

    Args:
        action: `warn`, `refuse` or `off`: the recipe's `contamination_check`.

    Raises:
        DataError: Naming the rows, where `action` is `refuse`.
    """
    if action == "off":
        return "not looked for (`contamination_check: off`)"
    overlaps = find_overlaps(train, test)
    if not overlaps:
        return f"none of {len(train)} training rows is one of {len(test)} test rows"
    kinds = Counter(overlap.kind for overlap in overlaps)
    shown = ", ".join(f"{o.train_id} is {o.test_id} ({o.kind})" for o in overlaps[:_SHOWN])
    line = (
        f"{len({o.train_id for o in overlaps})} of {len(train)} training rows overlap with "
        f"{len({o.test_id for o in overlaps})} of {len(test)} test rows "
        f"({', '.join(f'{n} by {kind}' for kind, n in kinds.items())}): {shown}"
        f"{', ...' if len(overlaps) > _SHOWN else ''}; drop these training rows, or the accuracy on the test rows is "
        f"partly memory"
    )
    if action == "refuse":
        raise DataError(f"{line}; or set `contamination_check: warn`")
    return line


def hash_pictures(sources: Sequence[ImageSource], *, progress: bool, label: str) -> list[PictureHash]:
    """The hashes of pictures, in order; a path that occurs again is read once."""
    known: dict[ImageSource, int] = {}
    order: list[int] = []
    distinct: list[ImageSource] = []
    for source in sources:
        key = source if isinstance(source, str | Path) else None
        if key is None or key not in known:
            if key is not None:
                known[key] = len(distinct)
            order.append(len(distinct))
            distinct.append(source)
        else:
            order.append(known[key])
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        bar = tqdm(pool.map(picture_hash, distinct), total=len(distinct), desc=label, disable=_quiet(progress))
        hashes = list(bar)
    return [hashes[i] for i in order]


def question_text(example: Example) -> str:
    """The question as its row has it, without the recipe's instruction; the words of the user where that is unknown."""
    for name in PROMPT_COLUMNS:
        if isinstance(text := example.columns.get(name), str):
            return text.replace(IMAGE_MARK, " ")
    turns = [message["content"] for message in example.messages if message["role"] == "user"]
    return "\n".join(block["text"] for blocks in turns for block in blocks if block["type"] == "text")


def words(text: str) -> list[str]:
    """Words, numbers and operators of a text, case folded: what n-grams are made of."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


class _TextIndex:
    """The n-grams of the test rows."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        rows_of: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for row, text in enumerate(texts):
            for gram in _grams(text):
                rows_of[gram].append(row)
        self._rows: Mapping[tuple[str, ...], list[int]] = {
            g: rows for g, rows in rows_of.items() if len(rows) <= COMMON
        }
        self._num_grams = Counter(row for rows in self._rows.values() for row in rows)
        self._short = {len(gram) for gram in self._rows if len(gram) < NGRAM}

    def shares(self, text: Sequence[str]) -> dict[int, float]:
        """Test row -> share of its n-grams that the text holds."""
        grams = _grams(text) if len(text) >= NGRAM or len(text) in self._short else set()
        hits = Counter(row for gram in grams for row in self._rows.get(gram, ()))
        return {row: count / self._num_grams[row] for row, count in hits.items()}


def _grams(text: Sequence[str]) -> set[tuple[str, ...]]:
    """Every run of `NGRAM` words; the whole of a shorter text."""
    if len(text) < NGRAM:
        return {tuple(text)} if text else set()
    return {tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)}


def _picture_groups(hashes: Sequence[PictureHash]) -> list[int]:
    """For each picture the first one that it may be a copy of."""
    index = PictureIndex(hashes)
    groups: list[int] = []
    for position, picture in enumerate(hashes):
        first = index.near(picture)[0]
        groups.append(position if first >= position else groups[first])
    return groups


def _with_pictures(
    examples: Sequence[Example], *, wanted: bool, progress: bool
) -> Iterable[tuple[Example, list[PictureHash]]]:
    """The examples with the hashes of their pictures, none where they are not wanted; a few hundred rows at once."""
    with tqdm(total=len(examples), desc="contamination", disable=_quiet(progress)) as bar:
        for start in range(0, len(examples), _BLOCK):
            block = [examples[i] for i in range(start, min(start + _BLOCK, len(examples)))]
            sources = [source for example in block for source in example.images] if wanted else []
            hashes = iter(hash_pictures(sources, progress=False, label=""))
            for example in block:
                yield example, [next(hashes) for _ in example.images] if wanted else []
            bar.update(len(block))


def _quiet(progress: bool) -> bool | None:
    return None if progress else True
