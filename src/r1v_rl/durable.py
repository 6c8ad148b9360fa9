"""File writes that a crash cannot leave half done, and the handle by which tests kill a process inside them."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from r1v_rl.errors import UserError

_points_passed: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kill this process with SIGKILL where the environment says so: `R1V_FAULT=name:N` strikes at the N-th passing.

    `checkpoint_write` lies before, inside and after every write of a save; `file_write` inside every other file.
    Does nothing when the variable is unset; only crash tests set it.
    """
    wanted = os.environ.get("R1V_FAULT")
    if not wanted:
        return
    point, _, number = wanted.rpartition(":")
    if point == name:
        _points_passed[name] = _points_passed.get(name, 0) + 1
        if _points_passed[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)


def fsync(path: Path) -> None:
    """Ask the disk to hold what `path` (a file or a folder) has in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, point: str = "checkpoint_write") -> None:
    """Write `data` to `path` in place; safe only inside a folder that is renamed when complete."""
    half = len(data) // 2
    with open(path, "wb", buffering=0) as file:
        fault_point(point)
        _write_all(file, memoryview(data)[:half])
        fault_point(point)
        _write_all(file, memoryview(data)[half:])


def replace_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: whoever reads it, at any moment or after a crash, sees the old content or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_file(aside, data, point="file_write")
        fsync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file of any size to; at the end of the block it becomes `path`, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        fault_point("file_write")
        fsync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)
    fault_point("file_write")


def open_alone(path: Path, in_use: str) -> FileIO:
    """A file to read and to append to, unbuffered, that no other process has open in this way; its folder is made.

    Raises:
        UserError: `PATH is in use by IN_USE`, where one has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+", buffering=0)  # noqa: SIM115  (open as long as the caller wants)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"{path} is in use by {in_use}") from error
    return file


def set_aside(folder: Path) -> Path:
    """Rename a folder whose place is wanted for another: nothing that was computed is deleted. Returns its new name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    fsync(folder.parent)
    return aside


def _write_all(file, data: memoryview) -> None:
    """A raw write may take less than it was given, as on a disk that is filling up."""
    while data:
        data = data[file.write(data) :]
