"""A short recipe of distillation against a scripted server, run by a fork server so that a test can kill it."""

import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import r1v_rl  # isort: skip  # noqa: F401  (prepares a spawned process before torchvision is imported)
import pyarrow.parquet as pq

from r1v_rl import cli
from r1v_rl.distill import main as _  # noqa: F401  (loaded by the fork server, once for all runs)
from r1v_rl.distill.prompts import SUB_SCORES

OUTPUTS = ("dataset.parquet", "rows.parquet", "report.html", "README.md")
KEYS: dict[str, Any] = {
    "judge_model": "judge", "reviser_model": "teacher", "generator_model": "writer", "ablation": False,
    "num_generations": 2, "temperature": 1.0, "max_completion_length": 128, "answer_kind": "number", "alpha": 0.7,
    "judge_concurrency": 8, "judge_max_retries": 2, "num_revisions": 2,
}  # fmt: skip


def write_rows(path: Path, count: int) -> Path:
    """Sums: row i asks for i + 7."""
    with path.open("w") as file:
        for i in range(count):
            row = {"id": f"row{i}", "problem": f"Row {i}: what is {i} plus 7?", "answer": str(i + 7)}
            file.write(json.dumps(row) + "\n")
    return path


def chain(answer: int, number: int = 0) -> str:
    """A chain, longer with every number."""
    return f"<think>Adding seven to it. {'So I check again. ' * number}</think>\n\\boxed{{{answer}}}"


def assessment(row: int) -> str:
    scores = {name: {"reason": f"row {row}", "score": (row + i) % 6} for i, name in enumerate(SUB_SCORES)}
    return json.dumps(scores)


def reply(request: dict) -> str:
    """What a perfect judge, a writer that is right on even rows, and a teacher that needs two tries say."""
    content = request["messages"][0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    row = int(re.search(r"Row (\d+):", text)[1])
    if request["model"] == "judge":
        return assessment(row)
    if request["model"] == "writer":
        return chain(row + 7 if row % 2 == 0 else row, 2 - request["seed"] % 2)
    if row % 10 == 9:
        return "I would rather not."
    return chain(row + 7 if "could not be used" in text else row + 1, 1)


def distill(folder: Path, model: Path, url: str, fault: str = "", **keys: Any) -> None:
    """`r1v-rl distill` into `folder/out`; its exit code is the process's."""
    os.environ["R1V_FAULT"] = fault
    given = {**KEYS, "dataset_name": str(folder / "rows.jsonl"), "output_dir": str(folder / "out")}
    given |= {"model_name_or_path": str(model), "judge_base_url": url, "generator_base_url": url, **keys}
    words = [word for key, value in given.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(cli.main(["distill", *words]))


def run(*arguments: Any, kill_after: float | None = None, **keys: Any) -> int:
    """Exit code of `distill(...)` in a process of its own; -9 where it was killed."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["distill.distill_run"])
    process = context.Process(target=distill, args=arguments, kwargs=keys)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def rows_of(folder: Path, name: str = "rows.parquet") -> list[dict]:
    return pq.ParquetFile(folder / "out" / name).read().to_pylist()
