"""The files of a round: answers, selection, training recipe, model; each is complete or absent."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1v_rl.config import dump_recipe
from r1v_rl.data.export import example_schema, image_root, write_parquet
from r1v_rl.durable import replace_file, replacing
from r1v_rl.sft.iterate.config import training_values
from r1v_rl.sft.iterate.selection import Decision
from r1v_rl.tracking.manifest import RUN_MANIFEST
from r1v_rl.types import Example

_ADDED = {
    "completion": pa.string(),
    "reason": pa.string(),
    "score": pa.int64(),
    "chain_source": pa.string(),
}
"""What a round adds to the columns of the dataset."""
_ANSWERS = pa.schema(
    [
        ("id", pa.string()),
        ("answer", pa.string()),
        ("completion", pa.string()),
        ("num_tokens", pa.int64()),
        ("is_truncated", pa.bool_()),
        ("correct", pa.bool_()),
        ("parsed_answer", pa.string()),
        ("verdict", pa.string()),
        ("judge_problem", pa.string()),
        ("chain", pa.string()),
        ("chain_source", pa.string()),
        ("score", pa.int64()),
        ("selected", pa.bool_()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Round:
    """`output_dir/round-t`."""

    output_dir: Path
    number: int
    """From 1."""

    @property
    def folder(self) -> Path:
        return self.output_dir / f"round-{self.number}"

    @property
    def parts(self) -> Path:
        """Answers as they come, part by part."""
        return self.folder / "parts"

    @property
    def distilled(self) -> Path:
        """What `distill` leaves, where it makes the round's chains."""
        return self.folder / "distill"

    @property
    def answers(self) -> Path:
        """Every row of the dataset: the answer, the verdict, the chain, the score, and why it was selected or not."""
        return self.folder / "answers.parquet"

    @property
    def selection(self) -> Path:
        """The rows that the round trains on."""
        return self.folder / "selection.parquet"

    @property
    def summary_path(self) -> Path:
        """The round's counts; written last, so that a round with it is selected in full."""
        return self.folder / "summary.json"

    @property
    def recipe(self) -> Path:
        return self.folder / "sft.yaml"

    @property
    def model(self) -> Path:
        """The stage folder that the training leaves."""
        return self.folder / "model"

    @property
    def is_trained(self) -> bool:
        return (self.model / RUN_MANIFEST).exists()

    def summary(self) -> dict[str, Any] | None:
        """None where the round is not selected yet."""
        return json.loads(self.summary_path.read_text()) if self.summary_path.exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        replace_file(self.summary_path, (json.dumps(summary, indent=1) + "\n").encode())

    def write_answers(
        self, examples: Sequence[Example], records: Sequence[Mapping[str, Any]], decisions: Sequence[Decision]
    ) -> None:
        """`answers.parquet`, in the order of the dataset."""
        rows = [
            {**record, "answer": example.answer, "chain_source": record["source"]}
            | {"selected": decision.selected, "reason": decision.reason}
            for example, record, decision in zip(examples, records, decisions, strict=True)
        ]
        with replacing(self.answers) as aside:
            pq.write_table(pa.Table.from_pylist(rows, schema=_ANSWERS), aside, compression="zstd")

    def write_recipe(self, values: Mapping[str, Any], model: str, learning_rate: float) -> None:
        """`sft.yaml`: the training keys of the recipe, on this round's selection, from the last round's model."""
        training = training_values(values)
        training |= {
            "model_name_or_path": model,
            "dataset_name": str(self.selection),
            "output_dir": str(self.model),
            "learning_rate": learning_rate,
        }
        if (root := image_root(values)) is not None:
            training["dataset_root"] = root
        replace_file(self.recipe, dump_recipe(training).encode())


def write_rows(path: Path, rows: Sequence[tuple[Example, Mapping[str, Any], Decision]]) -> None:
    """A parquet file that `load_examples` reads: the dataset's columns, completion, reason, score and chain_source."""
    added = [
        (
            example,
            {
                "completion": record["chain"],
                "reason": decision.reason,
                "score": record["score"],
                "chain_source": record["source"],
            },
        )
        for example, record, decision in rows
    ]
    write_parquet(path, added, _ADDED)


def check_columns(examples: Sequence[Example]) -> None:
    """Before hours of answering: that a parquet file can hold the dataset's columns.

    Raises:
        UserError: Naming the column that it cannot hold.
    """
    example_schema(examples, _ADDED)
