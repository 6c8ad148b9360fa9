"""A dataset -> a sequence of examples, every row of it checked before anything trains."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1v_rl.config import DataConfig, HeldoutConfig
from r1v_rl.data.images import check_image, image_hash
from r1v_rl.data.rows import RowReader
from r1v_rl.data.sources import ArrowRows, open_source, shown_faults
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.types import Example


class MappedExamples(Sequence[Example]):
    """Examples of a dataset that stays on disk: each is read when asked for."""

    def __init__(self, rows: ArrowRows, num_rows: int, reader: RowReader):
        self._rows, self._num_rows, self._reader = rows, num_rows, reader

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num_rows))]
        position = range(self._num_rows)[index]
        return self._reader.read(self._rows[position], position)


def load_examples(
    dataset_name: str | None,
    *,
    split: str = "train",
    dataset_config: str | None = None,
    dataset_root: str | Path | None = None,
    dataset_size: int | None = None,
    dataset_kwargs: Mapping[str, Any] | None = None,
    prompt_column: str | None = None,
    system_prompt: str | None = None,
    images_without_marks: str = "refuse",
    answer_required: bool = True,
    instruction: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    """The rows of a dataset as examples, in the order of the file.

    Args:
        dataset_name: A name of ours (`scenes`), a local file or folder, or a hub id.
        dataset_root: Folder that image paths start from and must stay in; by default that of the data file.
        dataset_size, limit: At most so many rows, the smaller of the two.
        answer_required: Whether a row without an answer is refused.
        seed: Which rows of a dataset of ours; files are not shuffled here.

    Raises:
        DataError: The first faulty rows by their ids, and how many there are.
    """
    if not dataset_name:
        raise RecipeError("the recipe must set `dataset_name`: scenes, a local file or folder, or a hub id")
    num_rows = min((n for n in (dataset_size, limit) if n is not None), default=None)
    source = open_source(
        dataset_name, split=split, num_rows=num_rows, seed=seed, config=dataset_config, kwargs=dataset_kwargs
    )
    root = Path(dataset_root) if dataset_root else source.root
    if root is not None and not root.is_dir():
        raise DataError(f"`dataset_root` must be a folder, received {root}")
    reader = RowReader(root, system_prompt, prompt_column, images_without_marks, answer_required, instruction)
    num_rows = len(source.rows) if num_rows is None else min(num_rows, len(source.rows))
    if num_rows == 0:
        raise DataError(f"dataset {dataset_name} has no rows")
    if isinstance(source.rows, ArrowRows):
        examples: Sequence[Example] = MappedExamples(source.rows, num_rows, reader)
        check_examples((source.rows[i] for i in range(num_rows)), reader, name=dataset_name)
        return examples
    return check_examples(source.rows[:num_rows], reader, name=dataset_name, keep=True)


def as_examples(dataset: Sequence) -> Sequence[Example]:
    """What a trainer is given: examples already, or rows to be read."""
    if len(dataset) and isinstance(dataset[0], Example):
        return dataset
    return examples_from_rows(dataset, images_without_marks="prepend", answer_required=False)


def load_configured_examples(
    config: DataConfig,
    *,
    split: str | None = None,
    answer_required: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    """The examples that a recipe's data keys name."""
    assert not isinstance(config.dataset_kwargs, str)
    return load_examples(
        config.dataset_name,
        split=split or config.dataset_train_split,
        dataset_config=config.dataset_config,
        dataset_root=config.dataset_root,
        dataset_size=config.dataset_size,
        dataset_kwargs=config.dataset_kwargs,
        prompt_column=config.dataset_prompt_column,
        system_prompt=config.system_prompt,
        images_without_marks=config.images_without_marks,
        answer_required=answer_required,
        instruction=config.instruction,
        limit=limit,
        seed=seed,
    )


def heldout_examples(
    heldout: HeldoutConfig, data: DataConfig, seed: int, *, answer_required: bool = True
) -> Sequence[Example]:
    """The held-out rows, read as the training rows are; none where the recipe names none."""
    if heldout.eval_dataset_name is None:
        return []
    rows = replace(
        data,
        dataset_name=heldout.eval_dataset_name,
        dataset_size=heldout.eval_dataset_size,
        dataset_kwargs=heldout.eval_dataset_kwargs,
    )
    return load_configured_examples(rows, split=heldout.eval_dataset_split, answer_required=answer_required, seed=seed)


def rows_sha256(examples: Iterable[Example]) -> str:
    """Hash of all that a row says, its pictures included: those on the disk by their sizes, else by their content."""
    digest = hashlib.sha256()
    for example in examples:
        said = [example.id, example.answer, example.messages, example.columns]
        digest.update(json.dumps(said, default=str).encode())
        for source in example.images:
            if isinstance(source, str | Path):
                digest.update(str(Path(source).stat().st_size).encode())
            else:
                digest.update(source if isinstance(source, bytes) else image_hash(source).encode())
    return digest.hexdigest()


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    image_root: str | Path | None = None,
    system_prompt: str | None = None,
    prompt_column: str | None = None,
    images_without_marks: str = "refuse",
    answer_required: bool = True,
    instruction: str | None = None,
) -> list[Example]:
    """Rows that are in memory already, read and checked as those of a file are.

    Args:
        image_root: Where relative image paths start, and what they must stay in.
    """
    root = Path(image_root) if image_root is not None else None
    reader = RowReader(root, system_prompt, prompt_column, images_without_marks, answer_required, instruction)
    return check_examples(rows, reader, keep=True)


def check_examples(
    rows: Iterable[Mapping[str, Any]], reader: RowReader, *, name: str = "dataset", keep: bool = False
) -> list[Example]:
    """Read every row and check every image; returns the examples where `keep`, else nothing.

    Raises:
        DataError: The first faulty rows by their ids, and how many there are.
    """
    kept: list[Example] = []
    faults: list[str] = []
    seen_ids: dict[str, int] = {}
    sound_paths: set[str] = set()
    for index, row in enumerate(rows):
        try:
            example = reader.read(row, index)
            if example.id in seen_ids:
                raise DataError(
                    f"row {example.id}: rows {seen_ids[example.id]} and {index} share this id; make ids unique"
                )
            seen_ids[example.id] = index
            for source in example.images:
                _check_once(source, example.id, reader.image_root, sound_paths)
        except DataError as error:
            faults.append(str(error))
            continue
        if keep:
            kept.append(example)
    if faults:
        raise DataError(f"{name}: {len(faults)} row(s) cannot be used\n{shown_faults(faults)}")
    return kept


def _check_once(source: Any, row_id: str, root: Path | None, sound_paths: set[str]) -> None:
    """Many rows may share a file; it is read once."""
    if isinstance(source, str) and source in sound_paths:
        return
    check_image(source, row_id=row_id, root=root)
    if isinstance(source, str):
        sound_paths.add(source)
