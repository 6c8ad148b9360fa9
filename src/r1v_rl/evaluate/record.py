"""`evaluation.json`: where it is, and whether it still says what the recipe asks about the model that stands there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1v_rl.checkpoints import file_sha256
from r1v_rl.tracking.manifest import RUN_MANIFEST

EVALUATION, ANSWERS = "evaluation.json", "evaluation.jsonl"
_PLACES = ("model_name_or_path", "output_dir")


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys that an evaluation depends on, beside the model."""
    return {key: value for key, value in sorted(values.items()) if key not in _PLACES}


def read_evaluation(folder: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's `evaluation.json`, if it belongs to the folder's manifest and to these recipe keys."""
    try:
        record = json.loads((folder / EVALUATION).read_text())
    except (FileNotFoundError, ValueError):
        return None
    same_model = record.get("manifest_sha256") == file_sha256(folder / RUN_MANIFEST)
    return record if same_model and record.get("settings") == settings_of(values) else None
