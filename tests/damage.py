"""Every file of a folder, damaged in every way that a disk, a copy or a person damages files."""

from collections.abc import Iterator
from pathlib import Path

FAULTS = ("removed", "cut", "emptied", "first bit", "middle bit", "last bit")


def damaged(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, fault) of each damage, while it is in place; then the file is as it was."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for fault in FAULTS:
            _damage(path, whole, fault)
            yield path.relative_to(folder).as_posix(), fault
            path.write_bytes(whole)


def _damage(path: Path, whole: bytes, fault: str) -> None:
    if fault == "removed":
        path.unlink()
    elif fault in ("cut", "emptied"):
        path.write_bytes(whole[: -1 if fault == "cut" else 0])
    else:
        place = {"first bit": 0, "middle bit": len(whole) // 2, "last bit": len(whole) - 1}[fault]
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
