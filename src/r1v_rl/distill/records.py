"""One row on its way through the distillation: what was measured, asked, generated, decided."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from r1v_rl.distill.prompts import SubScore
from r1v_rl.types import Example

Source = Literal["own", "revised", "none"]

SUB_SCORES = (
    "clarity", "necessity_by_ablation", "necessity_by_rules", "necessity_by_judge", "quality", "difficulty",
    "reasoning_demand", "integration_by_judge", "integration_by_rules",
)  # fmt: skip
"""Every sub-score, in [0, 1]."""


@dataclass
class Chain:
    """One generated or revised chain, judged."""

    text: str
    """What follows the prompt of the model in the recipe."""
    num_tokens: int
    is_truncated: bool
    source: Source = "own"
    correct: bool | None = None
    """None where nobody can tell."""
    answer: str | None = None
    verdict: str = ""
    problem: str = ""
    """What makes it unfit to be trained on, whatever its answer."""

    @property
    def is_good(self) -> bool:
        return self.correct is True and not self.problem and not self.is_truncated


@dataclass
class Row:
    """A row of the data set, and everything that is learned of it."""

    example: Example
    opens_think: bool = False
    """Whether its prompt ends inside an open `<think>`."""
    excluded: str = ""
    """Why it is not distilled at all: a duplicate, or a row of an evaluation set."""
    sub_scores: dict[str, SubScore] = field(default_factory=dict)
    vision: float | None = None
    text: float | None = None
    integration: float | None = None
    score: float | None = None
    """Weighted mean of the three, each scaled over the set."""
    penalty: float = 1.0
    token_budget: int | None = None
    chains: list[Chain] = field(default_factory=list)
    """The model's own, in the order of generation, then revisions."""
    kept: Chain | None = None
    reason: str = ""
    """Why this chain was kept, or none."""

    def value(self, name: str) -> float | None:
        """Of a sub-score; None where there is none."""
        return self.sub_scores[name].value if name in self.sub_scores else None

    @property
    def own(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.source == "own"]

    @property
    def revisions(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.source == "revised"]


_SUB_SCORE = pa.struct([("value", pa.float64()), ("reason", pa.string())])
_CHAIN = pa.struct(
    [
        ("text", pa.string()),
        ("num_tokens", pa.int64()),
        ("is_truncated", pa.bool_()),
        ("source", pa.string()),
        ("correct", pa.bool_()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("problem", pa.string()),
    ]
)
_SCORES: dict[str, pa.DataType] = {
    "vision": pa.float64(),
    "text": pa.float64(),
    "integration": pa.float64(),
    "score": pa.float64(),
    "penalty": pa.float64(),
    "token_budget": pa.int64(),
}
ROWS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("answer", pa.string()),
        ("opens_think", pa.bool_()),
        ("excluded", pa.string()),
        ("sub_scores", pa.struct([(name, _SUB_SCORE) for name in SUB_SCORES])),
        *_SCORES.items(),
        ("chains", pa.list_(_CHAIN)),
        ("kept", _CHAIN),
        ("reason", pa.string()),
    ]
)
"""`rows.parquet`: every row of the data set, whatever became of it."""

PROVENANCE: dict[str, pa.DataType] = {
    "generator": pa.string(),
    "weights_sha256": pa.string(),
    "prompts_sha256": pa.string(),
    "seed": pa.int64(),
}
EXPORTED: dict[str, pa.DataType] = {
    "completion": pa.string(),
    "distill": pa.struct(
        [
            *[(name, pa.float64()) for name in SUB_SCORES],
            *_SCORES.items(),
            ("num_tokens", pa.int64()),
            ("source", pa.string()),
            *PROVENANCE.items(),
        ]
    ),
}
"""What the data set has beside the columns that it had: the chain, and one column with its scores and provenance."""


def stored_row(row: Row) -> dict[str, Any]:
    """The row as `ROWS_SCHEMA` lists it."""
    return {
        "id": row.example.id,
        "answer": row.example.answer,
        "opens_think": row.opens_think,
        "excluded": row.excluded or None,
        "sub_scores": {name: asdict(score) for name, score in row.sub_scores.items()},
        **{name: getattr(row, name) for name in _SCORES},
        "chains": [asdict(chain) for chain in row.chains],
        "kept": None if row.kept is None else asdict(row.kept),
        "reason": row.reason,
    }


def exported_columns(row: Row, provenance: dict[str, Any]) -> dict[str, Any]:
    """The added columns of a kept row."""
    assert row.kept is not None
    return {
        "completion": row.kept.text,
        "distill": {
            **{name: row.value(name) for name in SUB_SCORES},
            **{name: getattr(row, name) for name in _SCORES},
            "num_tokens": row.kept.num_tokens,
            "source": row.kept.source,
            **provenance,
        },
    }
