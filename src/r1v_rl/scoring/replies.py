"""What was paid for once: replies of judges by the content of the question, on the disk before they count."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v_rl.durable import fault_point, open_alone

logger = logging.getLogger(__name__)

REPLIES = "replies.jsonl"
"""Where a command keeps them in its `output_dir`."""


def content_key(*parts: Any) -> str:
    """sha256 of JSON values: equal for equal content, whatever the order of a mapping's keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Spent:
    """What calls of a model took, as its endpoint reports it."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


class ReplyStore:
    """A file of lines `{"key": ..., "value": ..., "spent": [model, calls, input tokens, output tokens]}` that only
    grows; one process at a time writes to it. Values that belong together stand in one line, `{"entries": [[key,
    value], ...]}`.

    A value is on the disk when `put` returns. A line that a crash cut is removed when the file is opened: what it held
    is asked for again.

    Raises:
        UserError: If another process has the file open.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._file = open_alone(
            self._path,
            "another process: one run at a time writes to an `output_dir`; wait for the other one, or end it",
        )
        self.spent: dict[str, Spent] = {}
        """What each model took for the replies that are kept."""
        self._values = self._read()

    def __enter__(self) -> "ReplyStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        return self._values.get(key)

    def put(self, *pairs: tuple[str, Any], model: str = "", spent: Spent | None = None) -> None:
        """Keep (key, JSON value) pairs, all or none of them; a key that is there already keeps its first value.

        Args:
            model, spent: What the values cost, where a model was paid for them.
        """
        new = {key: value for key, value in pairs if key not in self._values}
        if not new and spent is None:
            return
        entry: dict[str, Any] = {"entries": list(new.items())}
        if len(new) == 1:
            ((key, value),) = new.items()
            entry = {"key": key, "value": value}
        if spent is not None:
            entry["spent"] = [model, spent.calls, spent.input_tokens, spent.output_tokens]
        lines = (json.dumps(entry) + "\n").encode()
        half = len(lines) // 2
        fault_point("reply_write")
        for piece in (lines[:half], lines[half:]):
            while piece:
                piece = piece[self._file.write(piece) or 0 :]
            fault_point("reply_write")
        os.fsync(self._file.fileno())
        self._values |= new
        if spent is not None:
            self.spent[model] = self.spent.get(model, Spent()) + spent
        fault_point("reply_write")

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: its last line was cut and is removed", self._path)
            self._file.truncate(whole)
        values: dict[str, Any] = {}
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                for key, value in entry["entries"] if "entries" in entry else [(entry["key"], entry["value"])]:
                    values.setdefault(key, value)
                if "spent" in entry:
                    model, *numbers = entry["spent"]
                    self.spent[model] = self.spent.get(model, Spent()) + Spent(*numbers)
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d cannot be read and is passed over", self._path, number)
        return values
