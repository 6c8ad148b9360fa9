"""Runs that are saved by one rank or two and resumed by two or one, on the same batches."""

import json
from pathlib import Path
from typing import Any

from grpo.engine_run import make_trainer, make_tuner

from r1v_rl.errors import CheckpointError

_RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
_INSIDE = {"beta": 0.04, "num_iterations": 2, **_RUN}
JOBS: dict[str, dict[str | None, dict]] = {
    "plain": {"both": _RUN},
    "inside": {
        "both": {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, **_INSIDE,
        },
        "one": {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 8, **_INSIDE,
        },
    },
    "lora": {"both": {"lora": {"modules_to_save": ["multi_modal_projector"]}, **_RUN}},
    "sft": {"both": _RUN},
}  # fmt: skip
"""Of `inside` the checkpoint is in the middle of a generation, and one rank has twice the micro-steps; of the others
it has twice the rows in each (`make_trainer`)."""


def save_and_resume(engine: str | None, model: Path, folder: Path, other: Path | None) -> None:
    """Every job to its end, its model in `folder/JOB-through`; and from the checkpoints in `other`, which another
    number of ranks wrote, its model in `folder/JOB-resumed`."""
    for job in JOBS:
        trainer = _trainer(engine, model, folder, job)
        trainer.train()
        trainer.save_model(str(folder / f"{job}-through"))
        if other is not None:
            resume(engine, model, folder, job, other)


def resume(engine: str | None, model: Path, folder: Path, job: str, other: Path) -> None:
    trainer = _trainer(engine, model, folder / "resumed", job)
    trainer.train(resume_from_checkpoint=str(other / job / "checkpoint-3"))
    trainer.save_model(str(folder / f"{job}-resumed"))


def refused(engine: str | None, model: Path, folder: Path, other: Path, changes: dict) -> None:
    """What each rank says to a checkpoint of `plain` that it cannot go on from, in `folder/refused-RANK.txt`."""
    trainer = make_trainer(engine, model, folder, {**_RUN, **changes})
    try:
        trainer.train(resume_from_checkpoint=str(other))
        said = ""
    except CheckpointError as error:
        said = str(error)
    (folder / f"refused-{trainer.accelerator.process_index}.txt").write_text(said)


def _trainer(engine: str | None, model: Path, folder: Path, job: str) -> Any:
    make, settings = make_tuner if job == "sft" else make_trainer, JOBS[job]
    return make(engine, model, folder / job, settings.get("one" if engine is None else "both", settings["both"]))
