"""What a distillation leaves: the data set for the next stage, every row with its reasons, a card, a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1v_rl.data.export import write_jsonl, write_parquet
from r1v_rl.distill.card import CARD, data_card
from r1v_rl.distill.config import DistillConfig, Recipe
from r1v_rl.distill.records import EXPORTED, ROWS_SCHEMA, Row, exported_columns, stored_row
from r1v_rl.distill.report import report_page
from r1v_rl.durable import replace_file, replacing
from r1v_rl.tracking.report import REPORT

DATASET = {"parquet": "dataset.parquet", "jsonl": "dataset.jsonl"}
ROWS = "rows.parquet"


def export(
    rows: Sequence[Row], recipe: Recipe, provenance: dict[str, Any], summary: dict[str, Any], output_dir: Path
) -> None:
    """Write everything; the same rows give the same bytes."""
    kept = [(row.example, exported_columns(row, provenance)) for row in rows if row.kept is not None]
    write = write_parquet if recipe.distill.export_format == "parquet" else write_jsonl
    write(output_dir / DATASET[recipe.distill.export_format], kept, EXPORTED)
    with replacing(output_dir / ROWS) as aside:
        pq.write_table(pa.Table.from_pylist([stored_row(row) for row in rows], schema=ROWS_SCHEMA), aside)
    replace_file(output_dir / CARD, data_card(rows, recipe, provenance, summary).encode())
    replace_file(output_dir / REPORT, report_page(rows, recipe, summary).encode())


def summarize(rows: Sequence[Row], config: DistillConfig) -> dict[str, Any]:
    """The counts and means of a run."""
    included = [row for row in rows if not row.excluded]
    kept = [row.kept for row in included if row.kept is not None]
    own = [chain for row in included for chain in row.own]
    sources = Counter(chain.source for chain in kept)
    return {
        "rows": len(rows),
        "excluded": len(rows) - len(included),
        "kept": len(kept),
        "kept_own": sources["own"],
        "kept_revised": sources["revised"],
        "dropped": len(included) - len(kept),
        "unscored": sum(_is_unscored(row, config) for row in included),
        "chains": len(own),
        "chains_right": sum(chain.correct is True for chain in own),
        "chains_degenerate": sum(bool(chain.problem) for chain in own),
        "chains_cut_off": sum(chain.is_truncated for chain in own),
        "mean_tokens": _mean([chain.num_tokens for chain in own]),
        "mean_tokens_kept": _mean([chain.num_tokens for chain in kept]),
        "mean_penalty": _mean([row.penalty for row in included], digits=4),
    }


def summary_lines(summary: Mapping[str, Any]) -> str:
    """The counts as a person reads them."""
    return (
        f"{summary['rows']} rows: {summary['kept']} kept ({summary['kept_own']} own, {summary['kept_revised']} "
        f"revised), {summary['dropped']} dropped, {summary['excluded']} excluded; {summary['unscored']} unscored\n"
        f"{summary['chains']} chains: {summary['chains_right']} right, {summary['chains_degenerate']} degenerate, "
        f"{summary['chains_cut_off']} cut off; {summary['mean_tokens']} tokens on average, "
        f"{summary['mean_tokens_kept']} of those kept; penalty {summary['mean_penalty']}"
    )


def _is_unscored(row: Row, config: DistillConfig) -> bool:
    """Whether the judge was asked for its scores and gave none."""
    return config.assessment == "judge" and row.text is None


def _mean(values: Sequence[float], digits: int = 1) -> float | None:
    return round(fmean(values), digits) if values else None
