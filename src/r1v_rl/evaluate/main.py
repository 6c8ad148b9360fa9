"""`r1v-rl evaluate`: a model's accuracy on held-out rows or benchmarks, written beside it."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from r1v_rl.checkpoints import file_sha256
from r1v_rl.config import DataConfig, build_configs, read_recipe
from r1v_rl.durable import replace_file
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.answering import AnswerFile
from r1v_rl.evaluate.grounding import grounding_lines
from r1v_rl.evaluate.heldout import EvaluationConfig, benchmark_examples, evaluate_model
from r1v_rl.evaluate.interval import Accuracy
from r1v_rl.evaluate.page import page
from r1v_rl.evaluate.record import ANSWERS, EVALUATION, PAGE, TABLE, begin, settings_of
from r1v_rl.evaluate.table import compared_runs, console, markdown
from r1v_rl.tracking.manifest import RUN_MANIFEST, versions
from r1v_rl.tracking.metrics import json_value
from r1v_rl.tracking.redaction import redact

CONFIGS = (EvaluationConfig, DataConfig)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when `evaluation.json` and `evaluation.jsonl` (every answer) stand in the output folder."""
    started = time.perf_counter()
    values = read_recipe(CONFIGS, argv, prog="r1v-rl evaluate")
    config, data = build_configs(CONFIGS, values)
    if not config.model_name_or_path:
        raise RecipeError("evaluate needs `model_name_or_path`: the folder of a model")
    folder = Path(config.model_name_or_path)
    output_dir = Path(config.output_dir or folder)
    with closing(AnswerFile(output_dir / ANSWERS)) as file:
        state = begin(output_dir, values, config.resume, file)
        found, answers = evaluate_model(config, data, file)
    found |= {"compared": compared} if (compared := compared_runs(config.compare or (), answers, config.seed)) else {}
    manifest = folder / RUN_MANIFEST
    record = {
        "model": str(folder),
        "manifest_sha256": file_sha256(manifest) if manifest.exists() else None,
        "settings": settings_of(values),
        "files": state["files"],
        **found,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    record = redact(json_value(record))
    if config.benchmarks:
        replace_file(output_dir / TABLE, markdown(record, config.compare or ()).encode())
        examples = benchmark_examples(config, data)
        replace_file(output_dir / PAGE, page(record, answers, examples, config.compare or ()).encode())
    replace_file(output_dir / EVALUATION, (json.dumps(record, indent=1) + "\n").encode())
    if config.benchmarks:
        print(f"{console(record, config.compare or ())}\n{output_dir / TABLE}, {output_dir / PAGE}", flush=True)
    else:
        _show(found, record["seconds"])
    return 0


def _show(found: dict, seconds: float) -> None:
    print(f"held-out accuracy, {found['num_rows']} rows, {found['num_generations']} answer(s) each, 95 % interval")
    for key, name in (("accuracy", "with pictures"), ("blank_accuracy", "blank pictures"), ("text_accuracy", "text")):
        if key in found:
            print(f"  {name:<16}{Accuracy(**found[key])}")
    for line in grounding_lines(found.get("grounding")):
        print(f"  {line}")
    print(f"  {'mean length':<16}{found['mean_length']:.1f} tokens, {100 * found['truncated_frac']:.1f} % cut off")
    print(f"  {'format':<16}{100 * found['format_rate']:.1f} %\n{seconds:.0f} s in all", flush=True)
