"""The metrics of a run as `metrics.jsonl` holds them, and as one line tells them to a person."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1v_rl.tracking.redaction import printable

METRICS_FILE = "metrics.jsonl"


def read_metrics(output_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, oldest first; a torn or foreign line is left out."""
    path = Path(output_dir, METRICS_FILE)
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def json_value(value: Any) -> Any:
    """`value` as JSON can hold it: a tensor or numpy scalar as its number, NaN and infinity as None, others as text."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    return [json_value(item) for item in value] if isinstance(value, list | tuple) else str(value)


_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("reward", "reward", "{:.3f}"),
    ("completions/mean_length", "tokens", "{:.0f}"),
    ("completions/clipped_ratio", "cut", "{:.0%}"),
    ("kl", "kl", "{:.2g}"),
    ("entropy", "entropy", "{:.2f}"),
    ("grad_norm", "grad", "{:.2g}"),
    ("step_time", "seconds", "{:.1f}"),
)


def progress_line(step: int, max_steps: int, logs: Mapping[str, Any]) -> str:
    """One line for a person: `step  12/200  reward 0.512  accuracy 0.43 ...`; logs of other kinds are given whole."""
    values = {key: json_value(value) for key, value in logs.items()}
    width = len(str(max_steps))
    cells = [f"step {step:{width}d}/{max_steps}"]
    if "loss" in values or "reward" in values:
        for key, label, layout in _COLUMNS:
            if isinstance(values.get(key), int | float):
                cells.append(f"{label} {layout.format(values[key])}")
            if key == "reward":
                cells += _reward_cells(values)
    else:
        numbers = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        intervals = {key for key in numbers if key.startswith("grounding/") and key.endswith(("_low", "_high"))}
        hidden = {"epoch", "total_flos", *intervals - {"grounding/gap_low", "grounding/gap_high"}}
        cells += [f"{key} {value}" for key, value in numbers.items() if key not in hidden]
    return printable("  ".join(cells)).replace("\n", " ")


def _reward_cells(values: Mapping[str, Any]) -> list[str]:
    cells = []
    for key, value in values.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "rewards" and parts[2] == "mean" and isinstance(value, int | float):
            cells.append(f"{parts[1].removesuffix('_reward')} {value:.3f}")
    return cells
