"""The part of the report that shows completions: early beside late, with pictures, rewards and advantages."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from r1v_rl.tracking.charts import number
from r1v_rl.tracking.completions import image_path, read_rollouts
from r1v_rl.tracking.redaction import redact

_MAX_GROUPS, _MAX_COMPLETIONS, _MAX_CHARS, _MAX_SIDE = 4, 3, 1500, 360
_COLUMNS_NOT_SHOWN = ["token_ids", "logprobs"]


def samples_html(output_dir: Path, steps: list[int]) -> str:
    """The first and the last stored step: examples that stand in both are set side by side, others below each other."""
    if not steps:
        return ""
    early = _groups(output_dir, steps[0])
    late = _groups(output_dir, steps[-1]) if len(steps) > 1 else {}
    both = [identity for identity in early if identity in late]
    parts = [_sample(output_dir, [(steps[0], early[i]), (steps[-1], late[i])]) for i in both[:_MAX_GROUPS]]
    if not both:
        for step, groups in ((steps[0], early), (steps[-1], late)):
            parts += [_sample(output_dir, [(step, group)]) for group in list(groups.values())[: _MAX_GROUPS // 2]]
    return f"<h2>Completions, early and late</h2>{''.join(parts)}"


def _groups(output_dir: Path, step: int) -> dict[str, list[dict[str, Any]]]:
    """The stored rows of a step by example, best reward first."""
    table = read_rollouts(output_dir, steps=[step])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.drop_columns([name for name in _COLUMNS_NOT_SHOWN if name in table.column_names]).to_pylist():
        groups.setdefault(row["example_id"], []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: -(row["reward"] if row["reward"] is not None else -1e9))
    return groups


def _sample(output_dir: Path, moments: list[tuple[int, list[dict[str, Any]]]]) -> str:
    first = moments[0][1][0]
    pictures = "".join(_picture(image_path(output_dir, identity)) for identity in first["image_hashes"] or [])
    gold = "" if first["gold"] is None else f'<div><span class="chip">gold <b>{escaped(first["gold"])}</b></span></div>'
    columns = "".join(_moment(step, rows) for step, rows in moments)
    return (
        f'<div class="card sample"><div class="ask">{pictures}<div class="prompt">'
        f"<h3>{escaped(first['example_id'])}</h3>"
        f'<pre>{shortened(first["prompt"])}</pre>{gold}</div></div><div class="pair">{columns}</div></div>'
    )


def _moment(step: int, rows: list[dict[str, Any]]) -> str:
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    mean = f", mean reward {number(sum(rewards) / len(rewards))}" if rewards else ""
    shown = _spread(rows)
    body = "".join(_completion(row) for row in shown)
    count = f"{len(shown)} of {len(rows)} completions" if len(shown) < len(rows) else f"{len(rows)} completions"
    return f'<div><div class="when">Step {step}</div><div class="soft">{count}{mean}</div>{body}</div>'


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From best to worst, evenly."""
    if len(rows) <= _MAX_COMPLETIONS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_MAX_COMPLETIONS - 1))] for i in range(_MAX_COMPLETIONS)]


def _completion(row: dict[str, Any]) -> str:
    advantage = row["advantage"]
    tone = "" if not advantage else " up" if advantage > 0 else " down"
    values = {key.removeprefix("rewards/"): row[key] for key in row if key.startswith("rewards/")}
    values |= {"reward": row["reward"], "advantage": advantage}
    chips = [f'<span class="chip">{escaped(name)} <b>{_number(value)}</b></span>' for name, value in values.items()]
    if row["answer"] is not None:
        chips.insert(0, f'<span class="chip">answer <b>{escaped(row["answer"][:60])}</b></span>')
    if row["is_truncated"]:
        chips.append('<span class="chip">cut by the limit</span>')
    return f'<div class="completion{tone}">{"".join(chips)}<pre>{shortened(row["completion"])}</pre></div>'


def _picture(path: Path) -> str:
    """The image as a data URL, made small; nothing where it is missing or cannot be read."""
    try:
        with Image.open(path) as stored:
            return picture_tag(stored.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""


def picture_tag(image: Image.Image) -> str:
    """The image as `<img>` with a data URL, made small."""
    image = image.copy()
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def escaped(value: Any) -> str:
    """Text for a page, secrets taken out."""
    return escape(str(redact(str(value))))


def shortened(text: str) -> str:
    """The same, cut where it is long."""
    text = redact(text)
    return escape(text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} … ({len(text)} characters)")


def _number(value: float | None) -> str:
    return "not judged" if value is None else number(value)
