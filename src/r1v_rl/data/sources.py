"""A dataset's name -> its rows: made here, read from a file, mapped from an Arrow folder, or fetched from a hub."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1v_rl.data.scene_lessons import scene_examples
from r1v_rl.errors import DataError

if TYPE_CHECKING:
    import datasets

OWN_DATASETS: Mapping[str, Callable[..., list[dict[str, Any]]]] = {"scenes": scene_examples}
"""Name -> maker of rows, called as `maker(split, n, seed, **dataset_kwargs)`."""
DEFAULT_NUM_ROWS = 4096

MAX_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """Rows, and where their relative image paths start."""

    rows: Sequence[Mapping[str, Any]]
    root: Path | None


class ArrowRows(Sequence):
    """Rows of a memory-mapped dataset, read when asked for; images stay encoded."""

    def __init__(self, dataset: "datasets.Dataset"):
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._dataset[range(len(self))[index]].to_pylist()[0]


def open_source(
    name: str, *, split: str, num_rows: int | None, seed: int, config: str | None, kwargs: Mapping[str, Any] | None
) -> Source:
    """The rows called `name`: one of ours, else a local path, else a hub id."""
    path = Path(name)
    if name in OWN_DATASETS:
        try:
            return Source(OWN_DATASETS[name](split, num_rows or DEFAULT_NUM_ROWS, seed, **(kwargs or {})), None)
        except TypeError as error:
            raise DataError(f"`dataset_kwargs` {kwargs} does not fit `{name}`: {error}") from error
    if kwargs:
        raise DataError(f"`dataset_kwargs` is for {', '.join(OWN_DATASETS)} only, not for {name}")
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        return Source(_open_file(path), path.parent)
    if path.suffix in _READERS or path.is_absolute() or name.startswith("."):
        raise DataError(
            f"dataset {name} does not exist; set `dataset_name` to a file, a folder, or one of ours (scenes)"
        )
    return Source(_open_hub(name, split, config), None)


def shown_faults(faults: Sequence[str]) -> str:
    """The first few faults and how many there are."""
    rest = len(faults) - MAX_FAULTS_SHOWN
    return "\n".join([*faults[:MAX_FAULTS_SHOWN], *([f"... and {rest} more rows like these"] if rest > 0 else [])])


def _open_folder(folder: Path, split: str) -> Source:
    """A `save_to_disk` folder, one data file a split, or pictures with a metadata file (`file_name` column)."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(_open_saved(folder, split), folder)
    for stem in (split, f"{split}-*", f"data/{split}-*", "data"):
        files = sorted(f for suffix in _READERS for f in folder.glob(stem + suffix))
        if len(files) == 1 or (files and all(f.suffix == ".parquet" for f in files)):
            rows = _read_parquet(files) if files[0].suffix == ".parquet" else _open_file(files[0])
            return Source(rows, folder)
        if files:
            raise DataError(f"{folder} holds {', '.join(f.name for f in files)}; name one of them in `dataset_name`")
    for pictures in (folder / split, folder):
        for metadata in (pictures / "metadata.jsonl", pictures / "metadata.csv"):
            if metadata.is_file():
                return Source([_with_picture(row) for row in _open_file(metadata)], pictures)
    raise DataError(
        f"{folder} holds no dataset: expected a save_to_disk folder, {split}.jsonl, .csv or .parquet, or pictures with "
        f"metadata.jsonl"
    )


def _with_picture(row: Mapping[str, Any]) -> dict[str, Any]:
    names = row.get("file_names", row.get("file_name"))
    return {**row, "images": names} if names is not None else dict(row)


def _open_file(path: Path) -> Sequence[Mapping[str, Any]]:
    if path.suffix not in _READERS:
        raise DataError(f"dataset file {path} must end in one of {', '.join(_READERS)}")
    return _READERS[path.suffix](path)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows, faults = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{path}:{number}: not JSON: {error}; mend or remove the line")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            faults.append(f"{path}:{number}: a row is a JSON object, received {type(row).__name__}")
    if faults:
        raise DataError(shown_faults(faults))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects; one object a line goes into a .jsonl file")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Empty cells are absent; an `images` cell may hold a JSON list of paths."""
    rows = []
    for number, cells in enumerate(csv.DictReader(io.StringIO(_read_text(path), newline="")), start=2):
        if None in cells or None in cells.values():
            raise DataError(f"{path}:{number}: this row has not as many cells as the header")
        row: dict[str, Any] = {key: cell for key, cell in cells.items() if cell != ""}
        if str(row.get("images", "")).startswith("["):
            try:
                row["images"] = json.loads(row["images"])
            except ValueError as error:
                raise DataError(f"{path}:{number}: `images` must be a path or a JSON list of paths: {error}") from error
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text: {error}") from error


def _read_parquet(paths: Path | list[Path]) -> Sequence[Mapping[str, Any]]:
    import datasets  # takes a second, and only these readers need it

    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    try:
        return ArrowRows(datasets.Dataset.from_parquet(names))
    except Exception as error:  # datasets wraps whatever Arrow found in errors of its own
        raise DataError(f"{', '.join(names)} cannot be read as parquet: {error.__cause__ or error}") from error


def _open_saved(folder: Path, split: str) -> ArrowRows:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a save_to_disk folder: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder} has the splits {', '.join(map(str, dataset))}, not {split}; set the split's key")
        dataset = dataset[split]
    return ArrowRows(dataset)


def _open_hub(name: str, split: str, config: str | None) -> ArrowRows:
    import datasets

    try:
        return ArrowRows(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # a dozen kinds, from no network to an unknown split
        raise DataError(
            f"dataset {name} is neither one of ours ({', '.join(OWN_DATASETS)}) nor a local path, and the hub does not "
            f"give it: {error}; check `dataset_name`, `dataset_config` and the split"
        ) from error


_READERS: Mapping[str, Callable[[Path], Sequence[Mapping[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
