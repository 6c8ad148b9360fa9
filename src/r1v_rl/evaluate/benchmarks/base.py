"""A published benchmark -> examples: its files found, each row read by the benchmark's own lines, the prompt built."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v_rl.data.dataset import check_examples
from r1v_rl.data.rows import IMAGE_MARK, RowReader
from r1v_rl.data.sources import Source, open_source
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.evaluate.accuracy import ACCEPTED
from r1v_rl.evaluate.prompts import Instructions
from r1v_rl.types import Example

_NUMBERED_MARK = re.compile(r"<image ?(\d+)>")
_BARE_LETTER_LINE = re.compile(r"\n[^\n]*\b(?:option|choice)['\u2019]?s? letter\b[^\n]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """A row of a benchmark, read."""

    id: str
    text: str
    """With `<image>`, or `<image 2>` for the second of `images`, where a picture stands; one alone goes first."""
    answer: str
    kind: str
    """Of `scoring`: math, number, choice, text."""
    choices: Sequence[str] = ()
    images: Sequence[Any] = ()
    hint: str = ""
    """What the answer must look like, after the question: the unit, the number of decimal places."""
    group: str = ""
    """Subject or task, by which accuracy is shown too."""
    answers: Sequence[str] = ()
    """Every gold answer, where a row has several of which any is right."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and how its rows are read."""

    name: str
    title: str
    read: Callable[[Mapping[str, Any], int], Question]
    """A row, as published or as a local copy has it, and its position -> the question."""
    num_rows: int
    """Of the published test split; fewer are said to be a part of it."""
    hub_id: str = ""
    split: str = "test"
    configs: tuple[str | None, ...] = (None,)
    """Configurations of the hub id, read one after the other: a folder each in a local copy."""
    files: tuple[str, ...] = ()
    """Data files of a local copy that are not called by the split, best first."""
    folders: tuple[str, ...] = ()
    """Names of its folder under `benchmark_root`, beside its own name and the last part of the hub id."""
    is_private: bool = False
    """Whether its questions must not be shown in plain text."""
    make: Callable[[int, int], Sequence[Mapping[str, Any]]] | None = None
    """(rows, seed) -> rows, for a benchmark that is made here."""


def load_benchmark(
    benchmark: Benchmark,
    instructions: Instructions,
    *,
    root: str | None = None,
    path: str | None = None,
    size: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
) -> list[Example]:
    """The questions of a benchmark as examples, with `answer_kind`, `choices`, `group` among their columns.

    Args:
        root: Folder with a folder for each benchmark; None = from the hub.
        path: Its own folder, file or hub id, before `root`.
        size: The first so many rows.

    Raises:
        DataError: If it is not there, or a row cannot be read.
    """
    reader = RowReader(system_prompt=system_prompt, images_without_marks="prepend")
    rows: list[dict[str, Any]] = []
    for source in _sources(benchmark, root, path, size, seed):
        for row in source.rows:
            if size is not None and len(rows) >= size:
                break
            rows.append(_row(_read(benchmark, row, len(rows)), source.root, instructions))
    if not rows:
        raise DataError(f"benchmark {benchmark.name} has no rows")
    return check_examples(rows, reader, name=f"benchmark {benchmark.name}", keep=True)


def prompt_of(question: Question, instructions: Instructions) -> str:
    """The text that is asked: pictures, question, hint, options one a line, instruction."""
    text = _BARE_LETTER_LINE.sub("", question.text).strip()
    if len(question.images) == 1:
        text = f"{IMAGE_MARK}\n{_NUMBERED_MARK.sub('', text).replace(IMAGE_MARK, '').strip()}"
    lines = [text, *([question.hint] if question.hint else [])]
    lines += [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices)]
    instruction = instructions.choice if question.kind == "choice" else instructions.open
    return "\n".join(lines) + (f"\n\n{instruction}" if instruction else "")


def first(row: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these columns that holds something."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), default)


def _read(benchmark: Benchmark, row: Mapping[str, Any], position: int) -> Question:
    try:
        return benchmark.read(row, position)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"benchmark {benchmark.name}: row {row.get('id', position)} is not as it is published "
            f"({type(error).__name__}: {error}); it has the columns {', '.join(map(str, row))}"
        ) from error


def _row(question: Question, root: Path | None, instructions: Instructions) -> dict[str, Any]:
    """A dataset row; numbered marks name pictures, so a picture that is not named is left out, as in MMMU."""
    images = list(question.images)
    prompt = prompt_of(question, instructions)
    if images:
        prompt, named = _marked(prompt, len(images))
        images = [images[number - 1] for number in named] or images
    paths = [root / image if root is not None and isinstance(image, str) else image for image in images]
    return {
        "id": question.id,
        "prompt": _NUMBERED_MARK.sub(IMAGE_MARK, prompt),
        "problem": _NUMBERED_MARK.sub("", question.text),
        "answer": question.answer,
        ACCEPTED: list(question.answers) or [question.answer],
        "answer_kind": question.kind,
        "choices": list(question.choices) or None,
        "group": question.group,
        "images": [str(path) if isinstance(path, Path) else path for path in paths],
    }


def _marked(prompt: str, num_images: int) -> tuple[str, list[int]]:
    """The prompt with a mark where each picture goes, and their numbers. A name that no picture goes with stays a word:
    MMMU's validation_Math_7 has 7 pictures and options that name thirty; a row's only picture stands in front already.
    """
    numbers: list[int] = []

    def mark(name: re.Match) -> str:
        number = int(name[1])
        if num_images == 1 or not 1 <= number <= num_images:
            return f"[image {number}]"
        numbers.append(number)
        return IMAGE_MARK

    return _NUMBERED_MARK.sub(mark, prompt), numbers


def _sources(benchmark: Benchmark, root: str | None, path: str | None, size: int | None, seed: int) -> list[Source]:
    if benchmark.make is not None:
        return [Source(benchmark.make(size or benchmark.num_rows, seed), None)]
    name = path or (_under(benchmark, Path(root)) if root else benchmark.hub_id)
    if not name:
        raise RecipeError(
            f"benchmark {benchmark.name} is not on the hub: set `benchmark_root` to the folder that holds its folder, "
            f"or `benchmark_paths: {{{benchmark.name}: FOLDER}}`"
        )
    if Path(name).is_dir():
        return _local(benchmark, Path(name))
    return [_open(name, benchmark, config) for config in benchmark.configs]


def _under(benchmark: Benchmark, root: Path) -> str:
    names = (benchmark.name, *benchmark.folders, *([benchmark.hub_id.split("/")[-1]] if benchmark.hub_id else []))
    for name in names:
        if (root / name).exists():
            return str(root / name)
    raise DataError(
        f"benchmark {benchmark.name}: `benchmark_root` {root} holds none of {', '.join(names)}; put it there, or name "
        f"its place in `benchmark_paths`"
    )


def _local(benchmark: Benchmark, folder: Path) -> list[Source]:
    """A local copy: files that the benchmark names, a folder a configuration, a data file called by the split."""
    for pattern in benchmark.files:
        if found := sorted(folder.glob(pattern)):
            return [Source(open_source(str(file), **_PLAIN, split=benchmark.split).rows, folder) for file in found]
    parts = [folder / config for config in benchmark.configs if config and (folder / config).is_dir()]
    return [_open(str(part), benchmark, None) for part in parts or [folder]]


def _open(name: str, benchmark: Benchmark, config: str | None) -> Source:
    return open_source(name, **{**_PLAIN, "config": config}, split=benchmark.split)


_PLAIN: dict[str, Any] = {"num_rows": None, "seed": 0, "config": None, "kwargs": None}
