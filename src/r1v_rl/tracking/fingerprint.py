"""What tells a file or a folder of data from another one, without reading its pictures."""

import hashlib
from pathlib import Path

from r1v_rl.checkpoints import file_sha256
from r1v_rl.tracking.manifest import RUN_MANIFEST

_HASHED_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".arrow", ".yaml", ".py", ".txt", ".jinja", ".safetensors"}


def fingerprint(path: Path, *, pictures_only: bool = False) -> str:
    """Hash of a file; over a folder, of its manifest where it has one, else of its files, where pictures count by name
    and size alone."""
    if path.is_file():
        return file_sha256(path)
    if (path / RUN_MANIFEST).is_file():
        return file_sha256(path / RUN_MANIFEST)
    digest = hashlib.sha256()
    for inside in sorted(found for found in path.rglob("*") if found.is_file()):
        if pictures_only and inside.suffix in _HASHED_SUFFIXES:
            continue
        content = file_sha256(inside) if inside.suffix in _HASHED_SUFFIXES else str(inside.stat().st_size)
        digest.update(f"{inside.relative_to(path).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
