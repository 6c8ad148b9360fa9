"""Examples written as files that `load_examples` reads again: parquet, or jsonl with a folder of pictures."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from r1v_rl.data.images import image_hash, load_image
from r1v_rl.data.rows import IMAGE_COLUMNS, PROMPT_COLUMNS
from r1v_rl.durable import replace_file, replacing
from r1v_rl.errors import UserError
from r1v_rl.types import Example, ImageSource

ExportedRow = tuple[Example, Mapping[str, Any]]
"""An example and the values of the columns that are added to it."""

_WRITE_ROWS = 256
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MESSAGES = pa.list_(
    pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))])
)
_OWN: Mapping[str, pa.DataType] = {
    "id": pa.string(),
    "messages": _MESSAGES,
    "images": pa.list_(_IMAGE),
    "answer": pa.string(),
}


def write_parquet(path: Path, rows: Sequence[ExportedRow], added: Mapping[str, pa.DataType]) -> None:
    """id, messages, images, answer, the `added` columns, and every other column of the dataset.

    Pictures that have a path stay where they are, others are embedded.
    """
    schema = example_schema([example for example, _ in rows], added)
    with replacing(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for start in range(0, len(rows), _WRITE_ROWS):
            block = [_row(*row, schema.names, added) for row in rows[start : start + _WRITE_ROWS]]
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
        if not rows:
            writer.write_table(schema.empty_table())


def write_jsonl(path: Path, rows: Sequence[ExportedRow], added: Mapping[str, pa.DataType]) -> None:
    """The same columns, one JSON object a line; every picture as a file in `images/` beside it, named by its pixels."""
    names = example_schema([example for example, _ in rows], added).names
    lines = []
    for example, values in rows:
        row = _row(example, values, names, added, embed=False)
        row["images"] = [_written(image, path.parent) for image in example.images]
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    replace_file(path, "".join(lines).encode())


def example_schema(examples: Sequence[Example], added: Mapping[str, pa.DataType]) -> pa.Schema:
    """The columns of the file.

    Raises:
        UserError: Naming a column of the dataset that no parquet file can hold.
    """
    columns: dict[str, pa.DataType] = {**_OWN, **added}
    taken = {*columns, *PROMPT_COLUMNS, *IMAGE_COLUMNS}  # a prompt column would be read before `messages`
    for name in dict.fromkeys(name for example in examples for name in example.columns if name not in taken):
        try:
            columns[name] = pa.array([example.columns.get(name) for example in examples]).type
        except pa.ArrowException as error:
            raise UserError(
                f"column `{name}` of the dataset mixes values that no parquet column holds ({error}); make them of one "
                f"type, or take the column out"
            ) from error
    return pa.schema(list(columns.items()))


def image_root(values: Mapping[str, Any]) -> str | None:
    """`dataset_root` for what was written from a recipe's dataset: where its image paths start."""
    name = values.get("dataset_name")
    if values.get("dataset_root"):
        return str(Path(values["dataset_root"]).resolve())
    path = Path(name) if name else None
    if path is None or not path.exists():
        return None
    return str((path if path.is_dir() else path.parent).resolve())


def _row(
    example: Example, values: Mapping[str, Any], names: Sequence[str], added: Mapping[str, Any], *, embed: bool = True
) -> dict[str, Any]:
    return {
        **{name: example.columns.get(name) for name in names},
        "id": example.id,
        "messages": example.messages,
        "images": [_stored(image) for image in example.images] if embed else None,
        "answer": example.answer,
        **{name: values[name] for name in added},
    }


def _stored(image: ImageSource) -> dict[str, Any]:
    """As Hugging Face datasets stores an image."""
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, Image.Image):
        return {"bytes": _png(image), "path": None}
    return {"bytes": None, "path": str(Path(image).resolve())}


def _written(image: ImageSource, folder: Path) -> str:
    name = f"images/{image_hash(image)}.png"
    if not (folder / name).exists():
        (folder / "images").mkdir(exist_ok=True)
        replace_file(folder / name, _png(image))
    return name


def _png(image: ImageSource) -> bytes:
    buffer = io.BytesIO()
    load_image(image).save(buffer, format="PNG")
    return buffer.getvalue()
