"""`r1v-rl iterate`: rounds of iterative fine-tuning, each resumed where it was interrupted."""

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from r1v_rl.checkpoints import checkpoint_folders, file_sha256
from r1v_rl.config import OPERATIONAL_KEYS, dump_recipe, read_recipe
from r1v_rl.data.dataset import heldout_examples, load_configured_examples, rows_sha256
from r1v_rl.distill.main import distill
from r1v_rl.durable import fault_point, replace_file
from r1v_rl.errors import UserError
from r1v_rl.scoring.judging import MAX_SCORE
from r1v_rl.scoring.replies import REPLIES, ReplyStore
from r1v_rl.scoring.scorer_config import Scorer
from r1v_rl.scoring.scorers import make_scorer
from r1v_rl.sft.iterate.answering import answer_rows, missing_parts, read_parts
from r1v_rl.sft.iterate.chains import give_chains, give_scores, judged_rows
from r1v_rl.sft.iterate.children import in_child, run_command
from r1v_rl.sft.iterate.config import CONFIGS, IterateConfig, Recipe, build_recipe
from r1v_rl.sft.iterate.distilled import distill_values, distilled_records
from r1v_rl.sft.iterate.rounds import Round, check_columns, write_rows
from r1v_rl.sft.iterate.selection import Decision, select, summarize, table
from r1v_rl.tracking.manifest import RUN_MANIFEST, write_run_manifest
from r1v_rl.tracking.metrics import METRICS_FILE, read_metrics
from r1v_rl.tracking.redaction import redact
from r1v_rl.tracking.report import REPORT, write_report
from r1v_rl.training.launch import say_contamination
from r1v_rl.types import Example

logger = logging.getLogger(__name__)

CONFIG, STATE, TOP_SCORE = "config.yaml", "state.json", "top_score.parquet"
_OF_THE_ROUND = (CONFIG, RUN_MANIFEST, METRICS_FILE, REPORT)
_PER_ROUND = ("taus", "learning_rates")
_NAMED = 5


@dataclass
class Run:
    """One call of the command."""

    recipe: Recipe
    scorer: Scorer
    output_dir: Path
    examples: Sequence[Example]
    data_hash: str

    @property
    def values(self) -> dict[str, Any]:
        return self.recipe.values

    @property
    def iterate(self) -> IterateConfig:
        return self.recipe.iterate

    @property
    def rounds(self) -> list[Round]:
        return [Round(self.output_dir, number) for number in range(1, self.iterate.num_rounds + 1)]

    @property
    def replies(self) -> Path:
        return self.output_dir / REPLIES

    def distill_values(self, round: Round, model: str) -> dict[str, Any]:
        """The recipe that makes the round's chains."""
        path = str(self.iterate.distill_recipe)
        return distill_values(path, self.values, model=model, folder=round.distilled, replies=self.replies)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when every round is trained, 130 after Ctrl-C, 143 after SIGTERM; the same command goes on."""
    values = read_recipe(CONFIGS, argv, prog="r1v-rl iterate")
    run = _prepare(values)
    if (run.output_dir / RUN_MANIFEST).exists():
        print(f"{run.output_dir} is complete\n{table([round.summary() or {} for round in run.rounds])}", flush=True)
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        model = str(values["model_name_or_path"])
        for round in run.rounds:
            if not round.is_trained:
                _select(run, round, model)
                code = _train(run, round, model)
                if code != 0:
                    return code
            model = str(round.model)
        _finish(run)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _prepare(values: dict[str, Any]) -> Run:
    """Everything that can be wrong is said here, before a model answers."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "iterate is one process that starts the others: run it without a launcher, and name the file for "
            "`accelerate launch` of each round's training in `accelerate_config`"
        )
    recipe = build_recipe(values)
    for model in (recipe.scorers.judge(), recipe.scorers.reviser()):
        if model is not None:
            logger.info("%s: %s", model.role, model.model)
    scorer = make_scorer(recipe.scorers)
    examples = load_configured_examples(recipe.data, seed=recipe.training.seed)
    check_columns(examples)
    tested = heldout_examples(recipe.heldout, recipe.data, recipe.training.seed, answer_required=False)
    say_contamination(examples, tested, recipe.data)
    output_dir = Path(values["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, scorer, output_dir, examples, rows_sha256(examples))
    if run.iterate.distill_recipe is not None:
        run.distill_values(run.rounds[0], str(values["model_name_or_path"]))
    _refuse_other_run(run)
    return run


def _refuse_other_run(run: Run) -> None:
    """Records what the run is made of, or compares it with what the folder's run was made of.

    Raises:
        UserError: If the folder holds rounds of another recipe, other data or another model.
    """
    parent = Path(str(run.values["model_name_or_path"]), RUN_MANIFEST)
    state = {"rows_hash": run.data_hash, "model": file_sha256(parent) if parent.exists() else None}
    if run.iterate.distill_recipe is not None:
        state["distill_recipe"] = file_sha256(run.iterate.distill_recipe)
    now = yaml.safe_load(dump_recipe(redact(run.values)))
    path = run.output_dir / STATE
    if path.exists():
        begun = sum(round.summary_path.exists() for round in run.rounds)
        then = yaml.safe_load((run.output_dir / CONFIG).read_text())
        changed = [
            key
            for key in {**then, **now}
            if key not in OPERATIONAL_KEYS.union(_PER_ROUND, ("accelerate_config",)) and then.get(key) != now.get(key)
        ]
        changed += [key for key in _PER_ROUND if _rounds_of(then, key)[:begun] != _rounds_of(now, key)[:begun]]
        changed = [f"`{key}` was {then.get(key)!r}, is {now.get(key)!r}" for key in changed]
        recorded = {"rows_hash": run.data_hash, **json.loads(path.read_text())}  # an earlier version had another one
        changed += [f"the {key.removesuffix('_hash')} changed" for key in state if recorded.get(key) != state[key]]
        if changed:
            raise UserError(
                f"{run.output_dir} holds rounds of another run: {'; '.join(changed)}; set it back, name another "
                f"`output_dir` (a copy of {REPLIES} there saves what judges were asked), or delete the folder"
            )
    replace_file(run.output_dir / CONFIG, dump_recipe(redact(run.values)).encode())
    replace_file(path, (json.dumps(state) + "\n").encode())


def _rounds_of(values: Mapping[str, Any], key: str) -> list:
    return values.get(key) or getattr(IterateConfig(), key)


def _select(run: Run, round: Round, model: str) -> None:
    """Leaves `answers.parquet`, `selection.parquet`, `summary.json` and prints the round's line."""
    if (summary := round.summary()) is None:
        started = time.perf_counter()
        num_rows, size, tau = len(run.examples), run.iterate.generation_batch_size, run.iterate.taus[round.number - 1]
        if run.iterate.distill_recipe is not None:
            in_child(distill, run.distill_values(round, model))
            records = distilled_records(round.distilled, run.examples)
        else:
            if missing_parts(round.parts, num_rows, size):
                in_child(answer_rows, run.values, model, round.number, round.parts, run.replies)
            records = read_parts(round.parts, num_rows, size)
        with ReplyStore(run.replies) as store:
            if run.iterate.distill_recipe is None:
                give_chains(run.examples, records, run.recipe, store)
            give_scores(run.examples, records, run.scorer, store)
        rows = judged_rows(records)
        decisions = select(rows, tau)
        kept = [row for row in zip(run.examples, records, decisions, strict=True) if row[2].selected]
        round.write_answers(run.examples, records, decisions)
        write_rows(round.selection, kept)
        summary = {"round": round.number, "tau": tau, "learning_rate": run.iterate.learning_rates[round.number - 1]}
        summary |= summarize(rows, decisions, tau)
        summary["mean_tokens"] = _one_digit(sum(record["num_tokens"] for record in records) / num_rows)
        summary["seconds"] = _one_digit(time.perf_counter() - started)
        fault_point("before_summary")
        round.write_summary(summary)
        _name_problems(records)
    shutil.rmtree(round.parts, ignore_errors=True)
    print(f"\n{table([summary])}", flush=True)
    if not summary["kept"]:
        raise UserError(
            f"round {round.number} selects none of {summary['rows']} rows (scores {summary['scores']}, "
            f"{summary['right']} right): {round.answers} says why for each; lower `taus`, or mend scorer or data"
        )


def _name_problems(records: Sequence[Mapping[str, Any]]) -> None:
    """Says which rows have no chain or no score, and which answers the judge could not judge; all are in the file."""
    kinds = {
        "row(s) without a right chain": [(r["id"], r["problem"]) for r in records if r["chain"] is None],
        "chain(s) that cannot be scored": [
            (r["id"], r["problem"]) for r in records if r["chain"] is not None and r["score"] is None
        ],
        "answer(s) that the judge cannot judge": [(r["id"], r["judge_problem"]) for r in records if r["judge_problem"]],
    }
    for kind, rows in kinds.items():
        if rows:
            named = "; ".join(f"{row_id}: {problem}" for row_id, problem in rows[:_NAMED])
            print(f"{len(rows)} {kind}: {named}{'; ...' if len(rows) > _NAMED else ''}", flush=True)


def _train(run: Run, round: Round, model: str) -> int:
    """The exit code of `r1v-rl sft` on the round's selection; it goes on from its own checkpoint where it has one."""
    round.write_recipe(run.values, model, run.iterate.learning_rates[round.number - 1])
    command = [sys.executable, "-m", "r1v_rl", "sft", "--config", str(round.recipe)]
    if run.iterate.accelerate_config is not None:
        launch = ["accelerate.commands.launch", "--config_file", run.iterate.accelerate_config, "-m"]
        command = [sys.executable, "-m", *launch, *command[2:]]
    if checkpoint_folders(round.model):
        command += ["--resume_from_checkpoint", "true"]
    code = run_command(command)
    fault_point("round_trained")
    if code == 0 and not round.is_trained:
        raise RuntimeError(f"the training of round {round.number} ended without {round.model / RUN_MANIFEST}")
    if code != 0:
        print(f"the training of round {round.number} ended with exit code {code}; see above", file=sys.stderr)
    return code


def _finish(run: Run) -> None:
    """The last round's model, `top_score.parquet`, `metrics.jsonl` of all rounds; the manifest last."""
    last = run.rounds[-1]
    for path in sorted(last.model.iterdir()):
        if path.is_file() and path.name not in _OF_THE_ROUND and not path.name.startswith("."):
            target = run.output_dir / path.name
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:  # another file system, or one without links
                shutil.copy2(path, target)
    num_top = _write_top_score(run, last)
    replace_file(run.output_dir / METRICS_FILE, _metrics(run.rounds).encode())
    write_report(run.output_dir)
    summaries = [round.summary() or {} for round in run.rounds]
    trained = json.loads((last.model / RUN_MANIFEST).read_text())
    write_run_manifest(
        run.output_dir,
        stage="iterate",
        parent=run.values["model_name_or_path"],
        config=run.values,
        data_hash=run.data_hash,
        weight_hashes=trained["weight_hashes"],
        seeds={"seed": run.recipe.training.seed},
        metrics={"rounds": summaries, "top_score_rows": num_top},
    )
    print(f"\n{table(summaries)}\n{num_top} rows with score {MAX_SCORE} in {run.output_dir / TOP_SCORE}", flush=True)
    if not num_top:
        print(f"no row has score {MAX_SCORE}: a GRPO stage has nothing to train on in {TOP_SCORE}", file=sys.stderr)


def _write_top_score(run: Run, last: Round) -> int:
    """Rows whose chain has the highest score in the last round: what the paper trains on with GRPO."""
    records = pq.ParquetFile(last.answers).read(columns=["chain", "chain_source", "score"]).to_pylist()
    rows = [
        (example, {**record, "source": record["chain_source"]}, Decision(True, f"score {MAX_SCORE}"))
        for example, record in zip(run.examples, records, strict=True)
        if record["score"] == MAX_SCORE
    ]
    write_rows(run.output_dir / TOP_SCORE, rows)
    return len(rows)


def _metrics(rounds: Sequence[Round]) -> str:
    """The training metrics of all rounds, steps counted on from round to round."""
    lines, offset = [], 0
    for round in rounds:
        metrics = read_metrics(round.model)
        lines += [json.dumps({**line, "step": line["step"] + offset, "round": round.number}) for line in metrics]
        offset += max((line["step"] for line in metrics), default=0)
    return "".join(line + "\n" for line in lines)


def _one_digit(value: float) -> float:
    return float(f"{value:.1f}")
