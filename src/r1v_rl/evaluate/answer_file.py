"""The file of an evaluation's answers: it only grows, and one process at a time writes to it."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1v_rl.durable import fault_point, open_alone
from r1v_rl.errors import UserError


class AnswerFile:
    """One line of JSON an answer, in the order of the rows; None for a path keeps them in memory."""

    def __init__(self, path: Path | None):
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        self.is_new = not path.exists()
        self._file = open_alone(path, "another evaluation; wait for it, or name another `output_dir`")

    def close(self) -> None:
        """Let other processes have the file."""
        if self._path is not None:
            self._file.close()

    def clear(self) -> None:
        """Forget what an earlier run left."""
        self._file.truncate(0)

    def take_over(self, chunks: Iterable[list[tuple[str, str, int]]]) -> int:
        """Read what an earlier run left and cut the file behind its last whole chunk; returns how many there are.

        Args:
            chunks: (set, id, sample) of each answer of each chunk.

        Raises:
            UserError: If the file holds answers to other rows.
        """
        if self._path is None:
            return 0
        self._file.seek(0)
        data = self._file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        position, whole = 0, 0
        for keys in chunks:
            part = [json.loads(line) for line in lines[position : position + len(keys)]]
            if [(row["set"], row["id"], row["sample"]) for row in part] != keys[: len(part)]:
                raise UserError(f"{self._path} holds answers to other rows; delete it, or set `resume: false`")
            if len(part) < len(keys):
                break
            position, whole = position + len(part), whole + 1
            self.rows += part
        self._file.truncate(sum(map(len, lines[:position])))
        os.fsync(self._file.fileno())
        return whole

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """They are on the disk when this returns."""
        self.rows += rows
        if self._path is None:
            return
        data = answer_lines(rows)
        fault_point("answers_write")
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            while piece:
                piece = piece[self._file.write(piece) or 0 :]
            fault_point("answers_write")
        os.fsync(self._file.fileno())


def answer_lines(answers: Sequence[dict]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers).encode()
