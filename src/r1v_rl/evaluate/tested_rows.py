"""The rows that a training set must not hold: held-out rows, and the benchmarks that the recipe names."""

from collections.abc import Sequence

from r1v_rl.config import DataConfig, nearest_key
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.benchmarks import BENCHMARKS
from r1v_rl.evaluate.benchmarks.base import load_benchmark
from r1v_rl.evaluate.prompts import Instructions
from r1v_rl.types import Example


def tested_rows(heldout: Sequence[Example], data: DataConfig) -> list[Example]:
    """The held-out rows, then those of every benchmark in `contamination_benchmarks`.

    Raises:
        UserError: If a benchmark is unknown or not there.
    """
    if data.contamination_check == "off":
        return []
    rows = list(heldout)
    for entry in data.contamination_benchmarks or ():
        name, _, path = entry.partition("=")
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise RecipeError(
                f"`contamination_benchmarks` must be of {known}, or name=folder; received {entry!r}."
                f"{nearest_key(name, BENCHMARKS)}"
            )
        rows += load_benchmark(BENCHMARKS[name], Instructions(), path=path or None)
    return rows
