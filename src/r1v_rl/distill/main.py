"""`r1v-rl distill`: rows in, checked reasoning chains of fitting length out, with a card and a report."""

import hashlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from r1v_rl.config import OPERATIONAL_KEYS, dump_recipe, read_recipe
from r1v_rl.distill.config import CONFIGS, Recipe, build_recipe
from r1v_rl.distill.estimate import estimate, table
from r1v_rl.distill.export import DATASET, ROWS, export, summarize, summary_lines
from r1v_rl.distill.generate import weights_sha256
from r1v_rl.distill.pipeline import Distillation, Source, read_source, replies_path
from r1v_rl.durable import replace_file
from r1v_rl.errors import UserError
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.tracking.manifest import RUN_MANIFEST, write_run_manifest
from r1v_rl.tracking.redaction import redact

CONFIG = "config.yaml"


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the data set is written, 130 after Ctrl-C, 143 after SIGTERM; the same command goes on."""
    values = read_recipe(CONFIGS, argv, prog="r1v-rl distill")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        distill(values)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def distill(values: dict[str, Any]) -> None:
    """Run the recipe; a folder that holds its result already is left as it is.

    Raises:
        UserError: For a mistake in recipe or data, an endpoint that refuses, a budget that is reached.
    """
    started = time.perf_counter()
    recipe = build_recipe(values)
    config = recipe.distill
    output_dir = Path(str(config.output_dir))
    source = read_source(recipe)
    fingerprint = _fingerprint(recipe, source)
    if not config.dry_run and _is_complete(output_dir, fingerprint):
        print(f"{output_dir} is complete", flush=True)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with ReplyStore(replies_path(config)) as store:
        if config.dry_run:
            print(table(estimate(source, config, store)), flush=True)
            return
        (output_dir / RUN_MANIFEST).unlink(missing_ok=True)  # it says that the folder is complete
        replace_file(output_dir / CONFIG, dump_recipe(redact(values)).encode())
        with ExitStack() as stack:
            run = Distillation(recipe, source, store, stack)
            run.run()
        _finish(recipe, source, run, store, fingerprint, time.perf_counter() - started)


def _finish(
    recipe: Recipe, source: Source, run: Distillation, store: ReplyStore, fingerprint: str, seconds: float
) -> None:
    """Everything in the folder; the manifest last."""
    config = recipe.distill
    output_dir = Path(str(config.output_dir))
    summary = summarize(source.rows, config)
    provenance: dict[str, Any] = {
        "generator": run.generator.name,
        "weights_sha256": run.generator.weights_sha256,
        "prompts_sha256": prompts_sha256(recipe),
        "seed": config.seed,
    }
    export(source.rows, recipe, provenance, summary, output_dir)
    print(summary_lines(summary), flush=True)
    if not summary["kept"]:
        raise UserError(f"none of {summary['rows']} rows has a right chain: {output_dir / ROWS} says why for each")
    spent = {model: [one.calls, one.input_tokens, one.output_tokens] for model, one in store.spent.items()}
    write_run_manifest(
        output_dir,
        stage="distill",
        parent=config.model_name_or_path if Path(str(config.model_name_or_path)).is_dir() else None,
        config=recipe.values,
        data_hash=source.data_hash,
        weight_hashes={"generator": provenance["weights_sha256"]},
        seeds={"seed": config.seed},
        metrics={**summary, "spent": spent, "seconds": round(seconds, 1), "fingerprint": fingerprint},
    )
    print(f"{output_dir / DATASET[config.export_format]}\n{seconds:.0f} s", flush=True)


def prompts_sha256(recipe: Recipe) -> str:
    """Of what judge and reviser are asked with."""
    config = recipe.distill
    return hashlib.sha256(json.dumps([config.assess_prompt, config.reviser_prompt]).encode()).hexdigest()


def _fingerprint(recipe: Recipe, source: Source) -> str:
    """Of everything that the result follows from: recipe, rows, weights."""
    keys = {key: value for key, value in recipe.values.items() if key not in OPERATIONAL_KEYS | {"dry_run"}}
    model = weights_sha256(str(recipe.distill.model_name_or_path))
    known = dump_recipe(redact(keys)), source.data_hash, model, prompts_sha256(recipe)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _is_complete(output_dir: Path, fingerprint: str) -> bool:
    try:
        manifest = json.loads((output_dir / RUN_MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return manifest.get("metrics", {}).get("fingerprint") == fingerprint
