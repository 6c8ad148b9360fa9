"""A round's chains from `r1v-rl distill`: it takes the place of answering and revising, before the round selects."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from r1v_rl.config import DataConfig, checked_values
from r1v_rl.distill import config as distill_config
from r1v_rl.distill.export import ROWS
from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import read_yaml
from r1v_rl.types import Example

SET_BY_ROUND = ("model_name_or_path", "output_dir", "replies", "seed", *[f.name for f in fields(DataConfig)])


def distill_values(
    recipe_path: str, values: Mapping[str, Any], *, model: str, folder: Path, replies: Path
) -> dict[str, Any]:
    """The recipe of `distill` in a file, with the round's model and folder and the data keys of the rounds.

    Args:
        values: The recipe of the rounds.
        replies: One file for all rounds: what was asked about a question is not asked again.

    Raises:
        RecipeError: If the file is no recipe of `distill`.
    """
    own = checked_values(distill_config.CONFIGS, read_yaml(Path(recipe_path)))
    kept = {key: value for key, value in own.items() if key not in SET_BY_ROUND}
    data = {key: values[key] for key in (*[f.name for f in fields(DataConfig)], "seed") if key in values}
    made = {"model_name_or_path": model, "output_dir": str(folder), "replies": str(replies)}
    found = {**kept, **data, **made}
    try:
        distill_config.build_recipe(found)
    except RecipeError as error:
        raise RecipeError(f"`distill_recipe` {recipe_path}: {error}") from error
    return found


def distilled_records(folder: Path, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """One record a row, as `answering` and `chains.give_chains` make them; the model's first chain is its answer."""
    rows = pq.ParquetFile(folder / ROWS).read().to_pylist()
    assert [row["id"] for row in rows] == [example.id for example in examples]
    return [_record(row) for row in rows]


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    first = next((chain for chain in row["chains"] if chain["source"] == "own"), None) or {}
    kept = row["kept"]
    source = "none" if kept is None else kept["source"]
    if source == "own" and kept["text"] != first.get("text"):
        source = "resampled"
    return {
        "id": row["id"],
        "opens_think": bool(row["opens_think"]),
        "completion": first.get("text", ""),
        "num_tokens": first.get("num_tokens", 0),
        "is_truncated": first.get("is_truncated", False),
        "correct": first.get("correct"),
        "parsed_answer": first.get("answer"),
        "verdict": first.get("verdict", ""),
        "judge_problem": row["excluded"] or "",
        "chain": None if kept is None else kept["text"],
        "source": source,
        "problem": "" if kept is not None else row["excluded"] or row["reason"].removeprefix("dropped: "),
    }
