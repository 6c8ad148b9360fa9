"""`evaluation.json`: where it is, and whether it still says what the recipe asks about the model that stands there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1v_rl.checkpoints import file_sha256
from r1v_rl.durable import replace_file
from r1v_rl.errors import UserError
from r1v_rl.evaluate.answer_file import AnswerFile
from r1v_rl.tracking.fingerprint import fingerprint
from r1v_rl.tracking.manifest import RUN_MANIFEST
from r1v_rl.tracking.redaction import redact

EVALUATION, ANSWERS = "evaluation.json", "evaluation.jsonl"
TABLE, PAGE = "evaluation.md", "evaluation.html"
STATE = "evaluation.state.json"
_ROWS = ("eval_dataset_name", "text_dataset_name", "dataset_root")
_NO_MATTER = ("model_name_or_path", "output_dir", "resume", "compare")


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys that an evaluation depends on, beside the model."""
    return {key: value for key, value in sorted(values.items()) if key not in _NO_MATTER}


def files_of(values: Mapping[str, Any], output_dir: Path) -> dict[str, str]:
    """Path -> fingerprint of the rows that are asked and of their pictures, where they are files.

    A folder that holds the evaluation's own, or the one it is run in, is none of pictures: runs write into it.
    """
    found = {}
    for key in _ROWS:
        path = Path(str(values.get(key) or ""))
        is_written_to = any(inside.is_relative_to(path.resolve()) for inside in (Path.cwd(), output_dir.resolve()))
        if path.exists() and not is_written_to:
            found[str(path)] = fingerprint(path, pictures_only=key == "dataset_root")
    return found


def read_evaluation(folder: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's `evaluation.json`, if it belongs to the folder's manifest, these recipe keys and their files."""
    try:
        record = json.loads((folder / EVALUATION).read_text())
    except (FileNotFoundError, ValueError):
        return None
    same_model = record.get("manifest_sha256") == file_sha256(folder / RUN_MANIFEST)
    files = files_of(values, folder)
    same_rows = record.get("settings") == settings_of(values) and record.get("files", files) == files
    return record if same_model and same_rows else None


def begin(output_dir: Path, values: Mapping[str, Any], resume: bool | None, answers: AnswerFile) -> dict[str, Any]:
    """Make `output_dir` ready for answers: those of an unfinished run of the same recipe, rows and model stay in it.

    Args:
        answers: Of `output_dir`, and open: another evaluation that writes there must not lose its own.

    Returns:
        `settings`, `files` and `model` that the answers belong to, as they were before the first one.

    Raises:
        UserError: If `resume` is true and what stands there is of other rows, recipe or model, or nothing does.
    """
    state = {"settings": redact(settings_of(values)), "files": files_of(values, output_dir), "model": _model_of(values)}
    now = json.loads(json.dumps(state, default=str))
    path = output_dir / STATE
    try:
        then = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        then = None
    if isinstance(then, dict):
        then.setdefault("files", now["files"])  # an earlier version did not write them down
    if then == now and resume is not False and not answers.is_new:
        return now
    if resume:
        why = f"{output_dir} holds no answers to go on with" if answers.is_new else _why_not(output_dir, then, now)
        raise UserError(f"`resume: true`: {why}; set `resume: false` to begin anew")
    answers.clear()
    replace_file(path, (json.dumps(now, indent=1) + "\n").encode())
    return now


def _why_not(output_dir: Path, then: dict | None, now: dict) -> str:
    if then is None:
        return f"{output_dir} holds no answers to go on with"
    old, new = then.get("settings") or {}, now["settings"]
    changed = [
        f"`{key}` was {old.get(key)!r}, is {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    changed += ["the rows are other ones"] if then.get("files") != now["files"] else []
    changed += ["the model is another one"] if then.get("model") != now["model"] else []
    return f"the answers in {output_dir} are of another run: {'; '.join(changed)}"


def _model_of(values: Mapping[str, Any]) -> str:
    """What tells a model from another: its manifest, else names, sizes and times of its files, else its hub id."""
    folder = Path(str(values["model_name_or_path"]))
    if not folder.is_dir():
        return str(folder)
    if (folder / RUN_MANIFEST).exists():
        return file_sha256(folder / RUN_MANIFEST)
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "evaluation."))
    )
    listing = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
