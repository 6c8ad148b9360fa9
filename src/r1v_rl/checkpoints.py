"""Checkpoint folders that are complete or absent.

A save is written under a temporary name beside its place, its manifest (size and sha256 of every file) last, and then
renamed. Resume takes the newest folder whose every byte agrees with its manifest and names those it passes over.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from r1v_rl.durable import fault_point, fsync, set_aside, write_file
from r1v_rl.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})
"""Formats whose loaders can run code: a checkpoint holds safetensors and JSON, none of these."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Hidden names: neither transformers' `checkpoint-(\d+)` nor its `checkpoint-*` glob finds them.
_WRITING, _REPLACED, _DELETING = ".writing-", ".replaced-", ".deleting-"
_BLOCK_BYTES = 1 << 20


@contextmanager
def writing(directory: Path | str, meta: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `directory`, on an exception nothing is left.

    Args:
        directory: The final name, for example `output_dir/checkpoint-12`; a folder of that name is replaced.
        meta: JSON values stored in the manifest, read when the block ends, so that the block may still add to it.
    """
    directory = Path(directory)
    temporary = begin(directory)
    try:
        yield temporary
        commit(temporary, directory, meta)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(directory: Path | str) -> Path:
    """Create and return the empty folder in which `directory` is prepared; with `commit`, `writing` in two halves.

    For several ranks: the main one calls `begin`, all write into `temporary_path(directory)`, the main one commits.
    """
    temporary = temporary_path(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def temporary_path(directory: Path | str) -> Path:
    """Where `directory` is prepared: the same name on every rank."""
    directory = Path(directory)
    return directory.with_name(_WRITING + directory.name)


def commit(temporary: Path, directory: Path | str, meta: dict[str, Any] | None = None) -> None:
    """Give `temporary` its manifest, make sure that it is on the disk, and rename it to `directory`.

    Raises:
        CheckpointError: If it holds a pickle or a link.
    """
    directory = Path(directory)
    paths = _files_below(temporary)
    refused = sorted(name for name, path in paths.items() if path.suffix in PICKLE_SUFFIXES or path.is_symlink())
    if refused:
        raise CheckpointError(
            f"a checkpoint holds safetensors and JSON only, {directory.name} was about to hold {', '.join(refused)}"
        )
    for path in paths.values():
        fault_point("checkpoint_write")
        fsync(path)
    write_file(temporary / MANIFEST, _render_manifest({"files": _fingerprints(paths), "meta": meta or {}}))
    fsync(temporary / MANIFEST)
    for folder in {path.parent for path in paths.values()} | {temporary}:
        fsync(folder)
    fault_point("checkpoint_write")
    replaced = directory.with_name(_REPLACED + directory.name)
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(directory, replaced)
        fault_point("checkpoint_write")
    os.rename(temporary, directory)
    fsync(directory.parent)
    fault_point("checkpoint_write")
    shutil.rmtree(replaced, ignore_errors=True)


def verify(path: Path | str) -> list[str]:
    """Everything wrong with a checkpoint folder, each entry naming a file; empty when it is complete and unaltered."""
    return _problems(Path(path), hashes=True)


def read_meta(path: Path | str) -> dict[str, Any]:
    """The `meta` that the save was given. Raises CheckpointError where the manifest cannot be trusted."""
    manifest, problem = _read_manifest(Path(path))
    if problem:
        raise CheckpointError(f"{path} is not a complete checkpoint: {problem}")
    return manifest["meta"]


def latest_complete(output_dir: Path | str) -> Path | None:
    """The `checkpoint-N` with the highest N that verifies, or None; a warning names each one passed over and why."""
    for path in checkpoint_folders(output_dir):
        problems = verify(path)
        if not problems:
            return path
        logger.warning("%s is not complete and is passed over: %s", path, _summary(problems))
    return None


def checkpoint_folders(output_dir: Path | str) -> list[Path]:
    """The folders named `checkpoint-N`, highest N first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def step_of(path: Path | str) -> int | None:
    """N of a folder named `checkpoint-N`, None for another name."""
    match = _CHECKPOINT.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def prune(output_dir: Path | str, keep: int | None, *, also: Collection[Path] = ()) -> list[Path]:
    """Delete checkpoints beyond the `keep` newest good ones (None keeps all) and return what was deleted; `also` (the
    best one, the one just written) stay.

    Only folders older than the newest one that verifies byte by byte are ever deleted, so a good one always stays; a
    torn folder does not count as kept.
    """
    if keep is None:
        return []
    if keep < 1:
        raise CheckpointError(f"save_total_limit must be at least 1, received {keep}")
    folders = checkpoint_folders(output_dir)
    newest_good = next((index for index, path in enumerate(folders) if not verify(path)), None)
    if newest_good is None:
        return []
    kept, deleted, stay = 1, [], {path.name for path in also}
    for path in folders[newest_good + 1 :]:
        if path.name in stay:
            continue
        if kept < keep and not _problems(path, hashes=False):
            kept += 1
            continue
        _delete(path)
        deleted.append(path)
    return deleted


def set_aside_after(output_dir: Path | str, step: int) -> list[Path]:
    """Rename every `checkpoint-N` of a later step, so that none is taken for one of the run that goes on from `step`.

    The newest goes first: after a kill in between, those left are still a run's first ones.
    """
    return [set_aside(path) for path in checkpoint_folders(output_dir) if (step_of(path) or 0) > step]


def clean_leftovers(output_dir: Path | str) -> list[Path]:
    """Remove what a killed save left behind, and return it; the main process calls this before a run starts.

    A folder that was moved away for a replacement that never arrived goes back to its name.
    """
    removed = []
    for path in sorted(Path(output_dir).glob(".*")):
        if path.name.startswith(_REPLACED):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            if not original.exists():
                os.rename(path, original)
                continue
        if path.name.startswith((_WRITING, _REPLACED, _DELETING)):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def file_sha256(path: Path | str) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _files_below(folder: Path) -> dict[str, Path]:
    """Every file and link below a folder, by its path with forward slashes; not the manifest, not hidden ones."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: path
        for name, path in paths.items()
        if (path.is_symlink() or not path.is_dir()) and name != MANIFEST and not path.name.startswith(".")
    }


def _fingerprints(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file; hashlib lets go of the interpreter, so threads hash in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(file_sha256, paths.values()))
    return {
        name: {"size": path.stat().st_size, "sha256": sha256}
        for (name, path), sha256 in zip(paths.items(), hashes, strict=True)
    }


def _render_manifest(content: dict[str, Any]) -> bytes:
    """The manifest's one possible text: a flipped bit anywhere in it, its own hash included, no longer matches."""
    body = {"files": content["files"], "meta": content["meta"]}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest and what is wrong with it."""
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    try:
        manifest = json.loads(data)
        if _render_manifest(manifest) != data:
            return {}, f"{MANIFEST} was altered"
    except (ValueError, KeyError, TypeError):
        return {}, f"{MANIFEST} is cut or altered"
    return manifest, None


def _problems(path: Path, *, hashes: bool) -> list[str]:
    if not path.is_dir():
        return [f"{path} is not a folder"]
    manifest, problem = _read_manifest(path)
    if problem:
        return [problem]
    present, problems, sound = _files_below(path), [], {}
    for name, expected in manifest["files"].items():
        file = present.pop(name, None)
        if file is None:
            problems.append(f"{name} is missing")
        elif ".." in PurePosixPath(name).parts or file.is_symlink() or not file.is_file():
            problems.append(f"{name} is not a plain file")
        elif file.suffix in PICKLE_SUFFIXES:
            problems.append(f"{name} is a pickle, which is never opened")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        else:
            sound[name] = file
    problems += [f"{name} is not in the manifest" for name in present]
    if hashes and not problems:
        found = _fingerprints(sound)
        problems += [f"{name} was altered" for name in sound if found[name] != manifest["files"][name]]
    return problems


def _summary(problems: list[str], shown: int = 3) -> str:
    rest = len(problems) - shown
    return "; ".join(problems[:shown]) + (f"; and {rest} more" if rest > 0 else "")


def _delete(path: Path) -> None:
    """Renamed first: a kill in the middle leaves no half folder under a checkpoint's name."""
    doomed = path.with_name(_DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
