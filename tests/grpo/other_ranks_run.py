"""Runs that end early on one rank or two and are resumed by two or one, on the same batches."""

import os
from pathlib import Path
from typing import Any

import torch
from grpo.engine_run import make_trainer, make_tuner
from transformers import TrainerCallback

from r1v_rl.errors import CheckpointError

_RUN = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
_INSIDE = {"beta": 0.04, "num_iterations": 2, **_RUN}
_ON_TWO = {
    "plain": _RUN,
    "inside": {
        **_INSIDE, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
    },
    "lora": {**_RUN, "lora": {"modules_to_save": ["multi_modal_projector"]}},
    "sft": _RUN,
}  # fmt: skip
_ON_ONE = {
    **_ON_TWO,
    "inside": {
        **_INSIDE, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 8,
    },
}  # fmt: skip
"""The checkpoint of `inside` is in the middle of a generation, of which every update takes half, and one rank has twice
the micro-steps; in the other jobs one rank has twice the rows in each, which `make_trainer` sees to."""


class Stop(TrainerCallback):
    """As a kill after the save of step 3, but the process goes on."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def run(engine: str | None, model: Path, folder: Path, job: str, other: Path | None = None, stop: bool = False) -> None:
    """A job to its end (or to its checkpoint), its model in `folder/JOB`; from the checkpoint that `other` holds."""
    settings = (_ON_ONE if engine is None else _ON_TWO)[job]
    make: Any = make_tuner if job == "sft" else make_trainer
    trainer = make(engine, model, folder / f"{job}-run", settings)
    if stop:
        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=None if other is None else str(other / f"{job}-run" / "checkpoint-3"))
    trainer.save_model(str(folder / job))


def on_two(engine: str, model: Path, folder: Path, jobs: list[str], alone: Path) -> None:
    """What one rank left in `alone` to its end, in `folder/resumed`; what one rank shall resume, in `folder`; and what
    each rank draws from after a resume and says to a checkpoint with twice the rows, in files of its own."""
    for job in jobs:
        run(engine, model, folder, job, stop=True)
        run(engine, model, folder / "resumed", job, alone)
    rank = os.environ["RANK"]
    (folder / f"seed-{rank}.txt").write_text(str(torch.initial_seed()))
    trainer = make_trainer(engine, model, folder / "refused", {**_RUN, "per_device_train_batch_size": 8})
    try:
        trainer.train(resume_from_checkpoint=str(alone / "plain-run" / "checkpoint-3"))
        said = "nothing"
    except CheckpointError as error:
        said = str(error)
    (folder / f"refused-{rank}.txt").write_text(said)
