"""What a stage depends on: its resolved recipe, its parents' manifests, and the files that the recipe names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1v_rl.chain.recipe import Chain, Stage
from r1v_rl.checkpoints import file_sha256
from r1v_rl.config import OPERATIONAL_KEYS
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tracking.fingerprint import fingerprint
from r1v_rl.tracking.manifest import RUN_MANIFEST
from r1v_rl.tracking.redaction import redact

_NOT_INPUTS = OPERATIONAL_KEYS | {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint"}


def stage_inputs(stage: Stage, chain: Chain) -> dict[str, Any]:
    """`{recipe, parents, files}`, comparable as it stands; a parent that is not there yet has the hash None."""
    values = {key: value for key, value in stage.values().items() if key not in _NOT_INPUTS}
    inputs = {
        "command": stage.command,
        "recipe": values,
        "parents": {name: manifest_sha256(chain.stage(name).folder) for name in stage.sources},
        "files": dict(_fingerprints(values, chain.output_dir)),
    }
    return json.loads(json.dumps(redact(inputs), default=str))


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in a user's words; nothing where the result would be the same."""
    words = []
    for kind, name in (("recipe", "key"), ("parents", "stage"), ("files", "file")):
        old, new = before.get(kind, {}), now[kind]
        keys = sorted({*old, *new} - (_NOT_INPUTS if kind == "recipe" else set()))
        words += [f"{name} {key}" for key in keys if old.get(key) != new.get(key)]
    return words + (["command"] if before.get("command") != now["command"] else [])


def manifest_sha256(folder: Path) -> str | None:
    """Hash of a stage's manifest; None while the stage is not complete."""
    return file_sha256(folder / RUN_MANIFEST) if read_manifest(folder) is not None else None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A complete stage's manifest, which every command writes last."""
    try:
        manifest = json.loads((folder / RUN_MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "stage" in manifest else None


def _fingerprints(value: Any, output_dir: Path, key: str = "") -> Iterator[tuple[str, str]]:
    """(path, hash) of every file and folder that stands anywhere in a recipe's values.

    What lies in the chain's own folder is made by its stages: files there are hashed, folders go by their manifests.
    `dataset_root` is where the rows' pictures are: another stage's rows beside them are none of this one's inputs.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _fingerprints(item, output_dir, name)
    elif isinstance(value, list):
        for item in value:
            yield from _fingerprints(item, output_dir)
    elif isinstance(value, str) and value:
        path = _existing_path(value)
        if path is None or path.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
            return
        if path.is_file() or output_dir.resolve() not in path.resolve().parents:
            yield value, fingerprint(path, pictures_only=key == "dataset_root")


def _existing_path(value: str) -> Path | None:
    """The path that a value names: itself, the file of `file.py:function`, or a shipped part's folder."""
    try:
        candidates = [Path(value), Path(value.rpartition(":")[0] or value), resolve_part(value)]
        return next((path for path in candidates if path.exists()), None)
    except (OSError, ValueError):  # too long for a path, a zero byte, no such part (a UserError)
        return None
