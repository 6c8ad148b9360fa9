"""Rollouts of a run: one parquet file a step, each image once, and the tables that show them."""

import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from r1v_rl.durable import replace_file
from r1v_rl.tracking.redaction import printable

_FILE = re.compile(r"step-(\d+)(?:-rank\d+)?\.parquet")


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """One completion with all that became of it."""

    example_id: str
    prompt: str
    """The text that the model saw, template included."""
    completion: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """The sampler's, one a token."""
    rewards: dict[str, float | None]
    """Each reward part by its name, unweighted; None where it could not judge."""
    reward: float | None
    """The weighted sum."""
    advantage: float | None
    weight_version: int
    is_truncated: bool
    answer: str | None = None
    """What was parsed from the completion."""
    gold: str | None = None
    images: Sequence[Image.Image] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    """Further columns, as reward functions log them."""


class RolloutStore:
    """Writes `output_dir/rollouts`; the same step written again, as after a resume, replaces itself."""

    def __init__(self, output_dir: Path | str, *, rank: int = 0):
        self.folder = Path(output_dir, "rollouts")
        self._rank = rank

    def write(self, step: int, records: Sequence[CompletionRecord]) -> Path:
        """Store the completions sampled for `step` and return the parquet file; images go to `rollouts/images`."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        hashes: dict[int, str] = {}  # the completions of a group share their image objects
        for record in records:
            for image in record.images:
                if id(image) not in hashes:
                    hashes[id(image)] = self._store_image(image)
        buffer = io.BytesIO()
        pq.write_table(_table(step, records, hashes), buffer, compression="zstd")
        suffix = f"-rank{self._rank:05d}" if self._rank else ""
        path = self.folder / f"step-{step:08d}{suffix}.parquet"
        replace_file(path, buffer.getvalue())
        return path

    def forget_after(self, step: int) -> None:
        """Delete what was stored for later steps: a run that resumes at `step` samples them again; -1 forgets all."""
        for path, stored_step in _files(self.folder.parent):
            if stored_step > step:
                path.unlink(missing_ok=True)  # another process may be as far

    def _store_image(self, image: Image.Image) -> str:
        identity = content_hash(image)
        path = self.folder / "images" / f"{identity}.png"
        if not path.exists():
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG", compress_level=3)
            replace_file(path, buffer.getvalue())
        return identity


def content_hash(image: Image.Image) -> str:
    """A sha256 over an image's size and RGB pixels: the same picture from another file has the same hash."""
    image = image.convert("RGB")
    return hashlib.sha256(b"%dx%d " % image.size + image.tobytes()).hexdigest()


def rollout_steps(output_dir: Path | str) -> list[int]:
    """The steps that `output_dir/rollouts` holds, in order."""
    return sorted({step for _, step in _files(output_dir)})


def read_rollouts(
    output_dir: Path | str, *, steps: Collection[int] | None = None, columns: list[str] | None = None
) -> pa.Table:
    """The stored completions of all or some steps, in order of step; a reward that some steps lack is null there."""
    wanted = sorted((step, path) for path, step in _files(output_dir) if steps is None or step in steps)
    tables = [pq.ParquetFile(path).read(columns=columns) for _, path in wanted]
    return pa.concat_tables(tables, promote_options="default") if tables else _table(0, [], {})


def image_path(output_dir: Path | str, identity: str) -> Path:
    """Where the image with this hash is stored."""
    return Path(output_dir, "rollouts", "images", f"{identity}.png")


def completions_table(wandb: Any, step: int, records: Sequence[CompletionRecord], max_rows: int) -> Any:
    """A wandb table of the first rows, under TRL's column names, every image in it."""
    records = records[:max_rows]
    parts = _names(record.rewards for record in records)
    columns = ["step", "prompt", "completion", *parts, "reward", "advantage", "answer", "gold", "example_id", "image"]
    pictures = {id(image): image for record in records for image in record.images}
    shown = {key: wandb.Image(image.convert("RGB")) for key, image in pictures.items()}
    rows = [
        [
            step,
            _text(record.prompt),
            _text(record.completion),
            *(_number(record.rewards.get(part)) for part in parts),
            _number(record.reward),
            _number(record.advantage),
            _text(record.answer),
            _text(record.gold),
            _text(record.example_id),
            [shown[id(image)] for image in record.images],
        ]
        for record in records
    ]
    return wandb.Table(columns=columns, data=rows)


def completion_lines(records: Sequence[CompletionRecord], limit: int, max_chars: int = 600) -> str:
    """The first `limit` completions as text for a terminal: control characters are shown, never obeyed."""
    lines = []
    for record in records[:limit]:
        parts = " ".join(f"{name}={_short(value)}" for name, value in record.rewards.items())
        lines.append(
            f"[{record.example_id}] gold {record.gold!s} | {parts} | reward {_short(record.reward)} | "
            f"advantage {_short(record.advantage)}"
        )
        text = record.completion
        lines.append(text if len(text) <= max_chars else f"{text[:max_chars]} ... ({len(text)} characters)")
    return printable("\n".join(lines))


def _files(output_dir: Path | str) -> list[tuple[Path, int]]:
    matches = ((path, _FILE.fullmatch(path.name)) for path in Path(output_dir, "rollouts").glob("step-*.parquet"))
    return [(path, int(match[1])) for path, match in matches if match]


def _table(step: int, records: Sequence[CompletionRecord], hashes: dict[int, str]) -> pa.Table:
    columns: dict[str, tuple[pa.DataType, Iterable]] = {
        "step": (pa.int64(), [step] * len(records)),
        "example_id": (pa.string(), [_text(r.example_id) for r in records]),
        "prompt": (pa.string(), [_text(r.prompt) for r in records]),
        "completion": (pa.string(), [_text(r.completion) for r in records]),
        "token_ids": (pa.list_(pa.int32()), [list(r.token_ids) for r in records]),
        "logprobs": (pa.list_(pa.float32()), [list(r.logprobs) for r in records]),
    }
    for name in _names(record.rewards for record in records):
        columns[f"rewards/{name}"] = (pa.float64(), [_number(r.rewards.get(name)) for r in records])
    columns |= {
        "reward": (pa.float64(), [_number(r.reward) for r in records]),
        "advantage": (pa.float64(), [_number(r.advantage) for r in records]),
        "answer": (pa.string(), [_text(r.answer) for r in records]),
        "gold": (pa.string(), [_text(r.gold) for r in records]),
        "weight_version": (pa.int64(), [r.weight_version for r in records]),
        "is_truncated": (pa.bool_(), [r.is_truncated for r in records]),
        "image_hashes": (pa.list_(pa.string()), [[hashes[id(image)] for image in r.images] for r in records]),
    }
    for name in _names(record.extra for record in records):
        columns[f"extra/{name}"] = (pa.string(), [_text(r.extra.get(name)) for r in records])
    return pa.table({name: pa.array(values, type=kind) for name, (kind, values) in columns.items()})


def _names(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _text(value: Any) -> str | None:
    """Text that UTF-8 can hold: a lone surrogate becomes its code."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _number(value: float | None) -> float | None:
    """NaN, a reward that could not judge, is null in every file."""
    return None if value is None or math.isnan(value) else float(value)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
