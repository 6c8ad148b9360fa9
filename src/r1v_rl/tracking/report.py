"""`report.html`: one self-contained page from what a run left. It loads nothing, runs no script, escapes every text."""

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from r1v_rl.durable import replace_file
from r1v_rl.errors import UserError
from r1v_rl.tracking.charts import interval_chart, line_chart, number
from r1v_rl.tracking.completions import rollout_steps
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.tracking.redaction import redact
from r1v_rl.tracking.samples import samples_html

REPORT = "report.html"

# Title, keys: TRL's names; the first key that a run logged is drawn, several keys of one list together.
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("reward",)),
    ("Grounding gap: accuracy with its picture minus without", ("grounding/*/accuracy_gap",)),
    ("Accuracy during training", ("eval_accuracy",)),
    ("Entropy at openings of reflections", ("eval_critical_token_entropy",)),
    ("Reward parts", ("rewards/*/mean",)),
    ("Reward spread by group", ("reward_std",)),
    ("Groups without a signal", ("frac_reward_zero_std",)),
    ("Completion tokens", ("completions/mean_length", "completions/mean_terminated_length")),
    ("Completions cut short", ("completions/clipped_ratio",)),
    ("Loss", ("loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("KL to the reference", ("kl",)),
    ("Entropy", ("entropy",)),
    ("Sampler against policy, Δ log p", ("sampling/sampling_logp_difference/*",)),
    ("Clipped tokens", ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")),
    ("Token accuracy", ("mean_token_accuracy",)),
    ("Learning rate", ("learning_rate",)),
    ("Seconds a step", ("step_time",)),
)
_MAX_OTHER_CURVES = 60
_REWARD_RISE = 0.05  # less is the noise of the batches


def main(argv: Sequence[str] | None = None) -> int:
    """`r1v-rl report OUTPUT_DIR`: write the page and print its path."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(f"usage: r1v-rl report OUTPUT_DIR (the folder of one run), received {arguments}")
    print(write_report(arguments[0]))
    return 0


def write_report(output_dir: Path | str) -> Path:
    """Write `output_dir/report.html` and return its path; whatever the run did not leave is left out of the page.

    Raises:
        UserError: If the folder is not there or holds nothing of a run.
    """
    output_dir = Path(output_dir)
    metrics = read_metrics(output_dir)
    steps = rollout_steps(output_dir)
    summary = _read_json(output_dir / "summary.json")
    if not metrics and not steps and not summary:
        raise UserError(
            f"report needs the output_dir of a run, with metrics.jsonl, rollouts or summary.json in it; "
            f"found none of them in {output_dir}"
        )
    manifest, config = _read_json(output_dir / "manifest.json"), _read_yaml(output_dir / "config.yaml")
    config = config or manifest.get("config") or {}
    curves = _series(metrics)
    sections = [
        _header(output_dir, manifest, config),
        _tiles(summary, curves, steps),
        _accuracy(summary),
        _grounding(curves),
        _curves(curves),
        samples_html(output_dir, steps),
        _values("Configuration", config),
        _values("Versions, hashes, seeds", {key: value for key, value in manifest.items() if key != "config"}),
    ]
    replace_file(output_dir / REPORT, html_page(output_dir.resolve().name, "".join(sections)).encode())
    return output_dir / REPORT


def html_page(title: str, body: str) -> str:
    """A whole page in the project's style; the body is HTML, its texts escaped."""
    template = files("r1v_rl.tracking").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body)


def _header(output_dir: Path, manifest: dict, config: dict) -> str:
    parts = [
        manifest.get("stage"),
        config.get("model_name_or_path"),
        config.get("dataset_name"),
        f"seed {config['seed']}" if "seed" in config else None,
    ]
    line = " · ".join(escape(str(redact(part))) for part in parts if part)
    return f'<h1>{escape(output_dir.resolve().name)}</h1><div class="soft">{line}</div>'


def _tiles(summary: dict, curves: dict[str, list], steps: list[int]) -> str:
    tiles = []
    before, after = (_share(summary.get(f"accuracy_{when}")) for when in ("before", "after"))
    if before and after:
        tiles.append((f"{100 * (after[0] - before[0]):+.1f} points", f"accuracy, {before[0]:.1%} to {after[0]:.1%}"))
    if curves.get("reward"):
        first, last = _ends(curves["reward"])
        tiles.append((f"{number(first)} → {number(last)}", "reward, first and last tenth"))
    if any(curves.values()):
        tiles.append((str(max(int(points[-1][0]) for points in curves.values())), "optimizer steps"))
    seconds = summary.get("seconds") or (curves["train_runtime"][-1][1] if curves.get("train_runtime") else None)
    if isinstance(seconds, int | float):
        tiles.append((_duration(seconds), "wall clock"))
    if summary.get("num_heldout"):
        tiles.append((str(summary["num_heldout"]), "held-out examples"))
    if steps:
        tiles.append((str(len(steps)), "stored rollout steps"))
    body = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{body}</div>'


def _accuracy(summary: dict) -> str:
    labels = (("before", "accuracy_before"), ("after", "accuracy_after"), ("blank images", "blank_image_accuracy"))
    rows = [(label, *share) for label, key in labels if (share := _share(summary.get(key)))]
    if not rows:
        return ""
    held_out = f" on {summary['num_heldout']} examples" if summary.get("num_heldout") else ""
    return (
        f"<h2>Held-out accuracy{escape(held_out)}{', with 95 % intervals' if rows[0][2] is not None else ''}</h2>"
        f'<div class="card wide">{interval_chart(rows)}</div>'
    )


def _grounding(curves: dict[str, list]) -> str:
    """A warning where the reward rose and the grounding gap's last interval reaches down to where the gap began."""
    gaps, lows, rewards = (curves.get(key) or [] for key in ("grounding/gap", "grounding/gap_low", "reward"))
    if len(gaps) < 2 or not lows or not rewards:
        return ""
    first, last = _ends(rewards)
    before, (_, after), (_, low) = gaps[0][1], gaps[-1], lows[-1]
    if last - first <= _REWARD_RISE or low > before:
        return ""
    return (
        '<div class="card wide"><h3>The reward rises without the grounding gap</h3>'
        f"<p>Reward {number(first)} → {number(last)}; accuracy with the pictures minus without {100 * before:+.1f} → "
        f"{100 * after:+.1f} points, at least {100 * low:+.1f}: nothing shows that what was learned comes from the "
        "pictures.</p></div>"
    )


def _curves(curves: dict[str, list]) -> str:
    cards, drawn = [], {"epoch"}
    for title, patterns in CURVES:
        keys = [key for pattern in patterns for key in _matching(pattern, curves)]
        drawn.update(keys)
        cards.append(_chart(title, {key: curves[key] for key in keys}))
    cards = [card for card in cards if card]
    if not cards:
        return ""
    others = [key for key, points in curves.items() if key not in drawn and len(points) > 1][:_MAX_OTHER_CURVES]
    more = "".join(_chart(key, {key: curves[key]}) for key in sorted(others))
    page = f'<h2>Curves</h2><div class="charts">{"".join(cards)}</div>'
    return page + (
        f'<details><summary>Every other metric</summary><div class="charts">{more}</div></details>' if more else ""
    )


def _chart(title: str, series: dict[str, list]) -> str:
    drawing = line_chart(series)
    if not drawing:
        return ""
    last = number(next(points for points in series.values() if points)[-1][1]) if len(series) == 1 else ""
    legend = ""
    if len(series) > 1:
        keys = (f'<span class="key c{i % 6}"></span>{escape(_short_name(key))}' for i, key in enumerate(series))
        legend = f'<div class="soft">{"".join(keys)}</div>'
    return (
        f'<div class="card"><div class="head"><h3>{escape(title)}</h3><span class="now">{last}</span></div>'
        f"{drawing}{legend}</div>"
    )


def _values(title: str, values: dict[str, Any]) -> str:
    """A folded table of values, nested ones under dotted keys."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in _flattened(redact(values))
    )
    if not rows:
        return ""
    return f'<details class="card"><summary>{escape(title)}</summary><table>{rows}</table></details>'


def _flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _series(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Each logged number over its step; a step that was logged twice keeps its last value."""
    found: dict[str, dict[int, float]] = {}
    for line in metrics:
        for key, value in line.items():
            if (
                key != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                found.setdefault(key, {})[line["step"]] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def _matching(pattern: str, curves: dict[str, list]) -> list[str]:
    start, star, end = pattern.partition("*")
    if not star:
        return [pattern] if pattern in curves else []
    return [key for key in curves if key.startswith(start) and key.endswith(end) and len(key) > len(start) + len(end)]


def _short_name(key: str) -> str:
    parts = key.split("/")
    return parts[1] if parts[0] in ("rewards", "grounding") and len(parts) == 3 else parts[-1]


def _ends(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the first and of the last tenth."""
    size = max(1, len(points) // 10)
    values = [y for _, y in points]
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _share(value: Any) -> tuple[float, float | None, float | None] | None:
    """Value, low and high of an accuracy in `summary.json`, a bare number included."""
    if isinstance(value, dict) and isinstance(value.get("value"), int | float):
        return value["value"], value.get("low"), value.get("high")
    return (value, None, None) if isinstance(value, int | float) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
