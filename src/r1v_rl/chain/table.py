"""`stages.json` and `stages.md`: what every stage took and reached; the first is also what a resumed run goes by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1v_rl.durable import replace_file
from r1v_rl.errors import CheckpointError
from r1v_rl.evaluate.interval import Accuracy

TABLE_JSON, TABLE_MARKDOWN = "stages.json", "stages.md"
PARTS = {"vision_encoder": "vision encoder", "projector": "projector", "language_model": "language model"}
_SHORT_HASH = 8


@dataclass
class StageRow:
    """One stage: what it was started with, how long it took, what its models reached."""

    inputs: dict[str, Any]
    """`chain.inputs.stage_inputs` when it was started."""
    seconds: float = 0.0
    """Of its command, over all attempts."""
    parts: dict[str, str] = field(default_factory=dict)
    """Part of the model -> the first digits of its hash, and `unchanged` or `changed` against the first parent's."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder inside the stage (`.` is its result) -> its `evaluation.json`."""


class StageTable:
    """The rows of a chain's stages, kept on disk."""

    def __init__(self, output_dir: Path, rows: Mapping[str, StageRow] | None = None):
        self.output_dir = output_dir
        self.rows = dict(rows or {})

    @classmethod
    def read(cls, output_dir: Path) -> "StageTable":
        """What an earlier run left; empty where there was none.

        Raises:
            CheckpointError: If the file was altered by hand and cannot be read.
        """
        path = output_dir / TABLE_JSON
        if not path.exists():
            return cls(output_dir)
        try:
            rows = json.loads(path.read_text())["stages"]
            return cls(output_dir, {row.pop("name"): StageRow(**row) for row in rows})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} says which stages are done, and cannot be read ({error}); put it back, or delete it and every "
                f"stage runs again"
            ) from error

    def write(self, order: Sequence[str]) -> None:
        """Both files, the stages in this order; stages that the chain no longer has stay known, should it have them
        again, and are not shown."""
        known = sorted(self.rows, key=lambda name: order.index(name) if name in order else len(order))
        rows = [{"name": name, **asdict(self.rows[name])} for name in known]
        replace_file(self.output_dir / TABLE_JSON, (json.dumps({"stages": rows}, indent=1) + "\n").encode())
        replace_file(self.output_dir / TABLE_MARKDOWN, (self.markdown(order) + "\n").encode())

    def markdown(self, order: Sequence[str]) -> str:
        """The table that a person reads, columns aligned: accuracy in %, with its 95 % interval."""
        header = ["stage", "accuracy", "blank pictures", "text only", "tokens", "format", "seconds", *PARTS.values()]
        lines = [header, *(line for name in order if name in self.rows for line in self._lines(name))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def _lines(self, name: str) -> list[list[str]]:
        row = self.rows[name]
        lines = []
        for inside, found in (row.evaluations or {".": {}}).items():
            is_result = inside == "."
            tail = [f"{row.seconds:.0f}", *(row.parts.get(part, "") for part in PARTS)] if is_result else [""] * 4
            lines.append([name if is_result else f"{name}/{inside}", *_cells(found), *tail])
        return lines


def _cells(found: Mapping[str, Any]) -> list[str]:
    def share(key: str) -> str:
        return str(Accuracy(**found[key])) if key in found else ""

    if not found:
        return [""] * 5
    return [
        share("accuracy"),
        share("blank_accuracy"),
        share("text_accuracy"),
        f"{found['mean_length']:.1f}",
        f"{100 * found['format_rate']:.1f} %",
    ]


def compare_parts(hashes: Mapping[str, str], parent: Mapping[str, str] | None) -> dict[str, str]:
    """Part -> what happened to it between the parent's model and this one, with the first digits of its hash."""
    if not parent:
        return {part: now[:_SHORT_HASH] for part, now in hashes.items()}
    return {
        part: f"{'unchanged' if parent.get(part) == now else 'changed'} {now[:_SHORT_HASH]}"
        for part, now in hashes.items()
    }
