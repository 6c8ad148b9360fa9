"""The report of a distillation: scores, penalty against length, accuracy by score, what became of the rows, samples."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from r1v_rl.data.images import load_image
from r1v_rl.distill.config import Recipe
from r1v_rl.distill.prompts import SubScore
from r1v_rl.distill.records import SUB_SCORES, Chain, Row
from r1v_rl.evaluate.interval import wilson
from r1v_rl.scoring.judging import question_text
from r1v_rl.tracking.charts import bar_chart, interval_chart, number, scatter_chart
from r1v_rl.tracking.redaction import redact
from r1v_rl.tracking.report import html_page

NUM_SAMPLES = 20
_NUM_BINS, _NUM_SCORE_BINS, _MAX_CHARS, _MAX_SIDE = 10, 5, 1500, 320


def report_page(rows: Sequence[Row], recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """One self-contained page; it loads nothing, runs no script, escapes every text."""
    included = [row for row in rows if not row.excluded]
    config = recipe.distill
    name = Path(str(config.output_dir)).resolve().name
    line = f"distill · {config.model_name_or_path} · {recipe.data.dataset_name} · seed {config.seed}"
    parts = [
        f'<h1>{escape(name)}</h1><div class="soft">{_text(line)}</div>',
        _tiles(summary),
        f"<h2>What became of {len(rows)} rows</h2>{_fates(rows)}",
        f"<h2>Scores</h2>{_distributions(included)}",
        f"<h2>Penalty, length and accuracy</h2>{_lengths(included)}",
        f"<h2>Samples</h2>{''.join(_sample(row) for row in samples(included))}",
    ]
    return html_page(name, "".join(parts))


def samples(rows: Sequence[Row], count: int = NUM_SAMPLES) -> list[Row]:
    """Rows of every fate, those of each spread over the penalties."""
    groups: dict[str, list[Row]] = {"own": [], "revised": [], "none": []}
    for row in sorted(rows, key=lambda row: (row.penalty, row.example.id)):
        groups["none" if row.kept is None else row.kept.source].append(row)
    share = {name: min(len(group), count // 3) for name, group in groups.items()}
    for name, group in groups.items():  # what one lacks goes to the next
        share[name] = min(len(group), share[name] + count - sum(share.values()))
    return [row for name, group in groups.items() for row in _spread(group, share[name])]


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    if count >= len(rows):
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]


def _tiles(summary: Mapping[str, Any]) -> str:
    shown = {
        "kept": summary["kept"],
        "kept as written": summary["kept_own"],
        "revised by the teacher": summary["kept_revised"],
        "dropped": summary["dropped"],
        "duplicates, evaluation rows": summary["excluded"],
        "unscored": summary["unscored"],
        "tokens of a kept chain": summary["mean_tokens_kept"],
        "penalty on average": summary["mean_penalty"],
    }
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in shown.items())
    return f'<div class="tiles">{tiles}</div>'


def _fates(rows: Sequence[Row]) -> str:
    """Reasons and how often, the commonest first."""
    counts: dict[str, int] = {}
    for row in rows:
        what = row.excluded.split(" row ")[0] if row.excluded else _fate(row)
        counts[what] = counts.get(what, 0) + 1
    lines = "".join(
        f"<tr><td>{count}</td><td>{_text(what)}</td></tr>"
        for what, count in sorted(counts.items(), key=lambda item: -item[1])[:30]
    )
    return f'<div class="card"><table>{lines}</table></div>'


def _fate(row: Row) -> str:
    if row.kept is not None and row.kept.source == "own":
        return "kept: the shortest right chain"
    return row.reason if row.kept is None else f"revised: {row.reason.split('; ', 1)[-1]}"


def _distributions(rows: Sequence[Row]) -> str:
    cards = []
    for name in ("score", "vision", "text", "integration"):
        cards.append(_histogram(name, [getattr(row, name) for row in rows]))
    for name in SUB_SCORES:
        cards.append(_histogram(name.replace("_", " "), [row.value(name) for row in rows]))
    return f'<div class="charts">{"".join(cards)}</div>'


def _histogram(title: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    counts = [0] * _NUM_BINS
    for value in known:
        counts[min(_NUM_BINS - 1, int(value * _NUM_BINS))] += 1
    bars = [(f"{i / _NUM_BINS:.1f}", float(count)) for i, count in enumerate(counts)]
    missing = f", {len(values) - len(known)} without" if len(known) < len(values) else ""
    return _card(title, f"mean {fmean(known):.2f}{missing}", bar_chart(bars))


def _lengths(rows: Sequence[Row]) -> str:
    """Penalty against length, both by point and by bin; accuracy by score."""
    chains = [(row, chain) for row in rows for chain in row.own]
    points = {"own chains": [(row.penalty, float(chain.num_tokens)) for row, chain in chains]}
    cards = [_card("Tokens of a chain over its penalty", "", scatter_chart(points))]
    by_penalty = _binned([(row.penalty, chain) for row, chain in chains], low=1.0, high=2.0)
    lengths = [(label, fmean(chain.num_tokens for chain in group)) for label, group in by_penalty]
    cards.append(_card("Mean tokens by penalty", "", bar_chart(lengths)))
    by_score = _binned([(row.score, chain) for row, chain in chains if row.score is not None], low=0.0, high=1.0)
    shares = []
    for label, group in by_score:
        right = wilson(sum(chain.correct is True for chain in group), len(group))
        shares.append((f"score {label} ({len(group)})", right.value, right.low, right.high))
    accuracy = f'<div class="card wide"><h3>Right chains by score</h3>{interval_chart(shares)}</div>' if shares else ""
    return f'<div class="charts">{"".join(cards)}</div>{accuracy}'


def _binned(pairs: Sequence[tuple[float, Chain]], *, low: float, high: float) -> list[tuple[str, list[Chain]]]:
    """Equal bins between the bounds; empty ones are left out."""
    bins: list[list[Chain]] = [[] for _ in range(_NUM_SCORE_BINS)]
    width = (high - low) / _NUM_SCORE_BINS
    for value, chain in pairs:
        bins[min(_NUM_SCORE_BINS - 1, int((value - low) / width))].append(chain)
    return [(f"{low + i * width:.1f}-{low + (i + 1) * width:.1f}", group) for i, group in enumerate(bins) if group]


def _sample(row: Row) -> str:
    pictures = "".join(_picture(source) for source in row.example.images)
    scores = {"penalty": f"{row.penalty:.3f}", "gold": row.example.answer}
    scores |= {name: number(getattr(row, name)) for name in ("score", "vision") if getattr(row, name) is not None}
    chips = "".join(f'<span class="chip">{name} <b>{_text(value)}</b></span>' for name, value in scores.items())
    parts = "".join(_sub_score(name, score) for name, score in row.sub_scores.items())
    chains = sorted(row.chains, key=lambda chain: chain is not row.kept)[:3]
    return (
        f'<div class="card sample"><div class="ask">{pictures}<div class="prompt"><h3>{_text(row.example.id)}</h3>'
        f'<pre>{_cut(question_text(row.example))}</pre>{chips}<div class="soft">{_text(row.reason)}</div></div></div>'
        f"<details><summary>Sub-scores</summary><table>{parts}</table></details>"
        f'<div class="pair">{"".join(_chain(chain, chain is row.kept) for chain in chains)}</div></div>'
    )


def _sub_score(name: str, score: SubScore) -> str:
    value = "none" if score.value is None else f"{score.value:.2f}"
    return f"<tr><td>{escape(name.replace('_', ' '))} {value}</td><td>{_text(score.reason)}</td></tr>"


def _chain(chain: Chain, is_kept: bool) -> str:
    tone = " up" if is_kept else " down" if chain.correct is False else ""
    words = ["kept"] if is_kept else []
    words += [chain.source, f"{chain.num_tokens} tokens", chain.verdict, chain.problem]
    words += ["cut by the limit"] if chain.is_truncated else []
    chips = "".join(f'<span class="chip">{_text(word)}</span>' for word in words if word)
    return f'<div class="completion{tone}">{chips}<pre>{_cut(chain.text)}</pre></div>'


def _picture(source: Any) -> str:
    image: Image.Image = load_image(source)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _card(title: str, note: str, drawing: str) -> str:
    head = f'<div class="head"><h3>{escape(title)}</h3><span class="soft">{escape(note)}</span></div>'
    return f'<div class="card">{head}{drawing}</div>' if drawing else ""


def _text(value: Any) -> str:
    return escape(str(redact(str(value))))


def _cut(text: str) -> str:
    return _text(text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} … ({len(text)} characters)")
