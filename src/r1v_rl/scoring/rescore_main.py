"""`r1v-rl rescore`: other rewards over the stored rollouts of a run, without a model."""

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from r1v_rl.config import build_configs, read_recipe
from r1v_rl.durable import replace_file
from r1v_rl.errors import RecipeError
from r1v_rl.scoring.config import NamedRewardConfig
from r1v_rl.scoring.loader import RewardFunction, load_rewards
from r1v_rl.scoring.rules import RewardSettings
from r1v_rl.tracking.completions import read_rollouts, rollout_steps

_DEFAULT = RewardSettings()


@dataclass
class RewardKeys(NamedRewardConfig):
    """Which rewards, and how they judge."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Names, dotted paths, or path/file.py:function."},
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each; unset = 1."})
    answer_kind: str = field(default=_DEFAULT.answer_kind, metadata={"help": "math, number, choice, text."})
    format_pattern: str = field(default=_DEFAULT.format_pattern, metadata={"help": "What `format` looks for."})
    reward_timeout_s: float = field(default=_DEFAULT.reward_timeout_s, metadata={"help": "Seconds for one answer."})
    reward_failure: str = field(
        default=_DEFAULT.reward_failure, metadata={"help": "abort or skip.", "choices": ["abort", "skip"]}
    )
    reward_workers: int = field(default=_DEFAULT.reward_workers, metadata={"help": "Processes that judge."})
    prompt_opens_think: bool | None = field(
        default=None, metadata={"help": "Whether the template opens `<think>`; unset = told from each completion."}
    )

    def weights(self) -> list[float]:
        """One weight for each reward."""
        weights = self.reward_weights if self.reward_weights is not None else [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise RecipeError(f"`reward_weights` has {len(weights)} values for {len(self.reward_funcs)} `reward_funcs`")
        return weights


@dataclass
class RescoreConfig(RewardKeys):
    """What `r1v-rl rescore` reads and writes."""

    run: str | None = field(default=None, metadata={"help": "A run's output_dir, which holds `rollouts`."})
    output: str | None = field(
        default=None,
        metadata={"help": "parquet file to write; unset = RUN/rescored.parquet. Rollouts stay as they are."},
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the parquet file with the new rewards stands."""
    arguments = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    (config,) = build_configs((RescoreConfig,), read_recipe((RescoreConfig,), arguments, prog="r1v-rl rescore"))
    if not config.run or not (steps := rollout_steps(config.run)):
        raise RecipeError(f"rescore needs `run`: the output_dir of a run with stored rollouts; received {config.run!r}")
    weights = config.weights()
    output = Path(config.output) if config.output else Path(config.run, "rescored.parquet")
    functions = load_rewards(config.reward_funcs, config)
    tables = []
    for step in tqdm(steps, desc="rescoring", unit=" steps", disable=None):
        tables.append(_rescored(read_rollouts(config.run, steps=[step]), functions, weights))
    table = pa.concat_tables(tables, promote_options="default")
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    replace_file(output, buffer.getvalue())
    for function in functions:
        function.close()
    _show(table, [function.name for function in functions], output)
    return 0


def _rescored(table: pa.Table, functions: Sequence[RewardFunction], weights: Sequence[float]) -> pa.Table:
    rows = {name: table.column(name).to_pylist() for name in table.column_names}
    known = {"step", "example_id", "prompt", "completion", "token_ids", "logprobs", "gold", "advantage"}
    extra: dict[str, list[Any]] = {}
    arguments: dict[str, Any] = {
        **{name: values for name, values in rows.items() if name not in known and "/" not in name},
        "prompts": rows["prompt"],
        "completions": [[{"role": "assistant", "content": text}] for text in rows["completion"]],
        "completion_ids": rows["token_ids"],
        "id": rows["example_id"],
        "answer": rows["gold"],
        "log_extra": lambda name, values: extra.__setitem__(name, list(values)),
        "log_metric": lambda *_: None,
    }
    total = [0.0] * table.num_rows
    kept = [name for name in ("step", "example_id", "prompt", "completion", "gold", "reward") if name in rows]
    new = table.select([*kept, *(name for name in rows if name.startswith("rewards/"))])
    for function, weight in zip(functions, weights, strict=True):
        rewards = function(**arguments)
        new = new.append_column(f"rescored/{function.name}", pa.array(rewards, pa.float64()))
        total = [a + weight * (0.0 if b is None else b) for a, b in zip(total, rewards, strict=True)]
    for name, values in extra.items():
        if name not in new.column_names and len(values) == table.num_rows:
            new = new.append_column(name, pa.array([None if v is None else str(v) for v in values], pa.string()))
    return new.append_column("rescored", pa.array(total, pa.float64()))


def _show(table: pa.Table, names: Sequence[str], output: Path) -> None:
    print(f"{table.num_rows} completions -> {output}")
    print(f"{'reward':<28}{'stored':>10}{'now':>10}{'changed':>10}")
    for name, old, new in [(n, f"rewards/{n}", f"rescored/{n}") for n in names] + [("sum", "reward", "rescored")]:
        now = table.column(new).to_pylist()
        before = table.column(old).to_pylist() if old in table.column_names else [None] * len(now)
        pairs = [(a, b) for a, b in zip(before, now, strict=True) if a is not None and b is not None]
        changed = f"{sum(abs(a - b) > 1e-6 for a, b in pairs)}" if pairs else "-"
        print(f"{name:<28}{_mean(before):>10}{_mean(now):>10}{changed:>10}")


def _mean(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{statistics.fmean(numbers):.4f}" if numbers else "-"
