"""Rows of unlike length, and a fine-tuning run of a random tiny model in a process that a test can kill."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from killer import Killer
from random_vlm import picture

from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.trainer import SFTTrainer
from r1v_rl.state_files import weight_hash

_SIZES = [[(32, 32)], [], [(64, 32), (32, 32)], [(32, 96)], []]  # one tile, text only, two pictures, tiles, text only
_TARGETS = [
    "Look a1 red circle 3</think>\n\\boxed{3}", "About 4</think>\n\\boxed{4}", "\\boxed{red}",
    "Look a1 . a2 . a3 blue square 5 a4 green circle 1</think>\n\\boxed{12}", "total red 2</think>\n\\boxed{2}",
]  # fmt: skip
ROWS = [
    {
        "id": f"row{i}",
        "prompt": [{"role": "user", "content": "How many red circles? " * (1 + i % 3)}],
        "completion": target,
        "images": [picture(i, *size) for size in sizes],
    }
    for i, (sizes, target) in enumerate(zip(_SIZES * 2, _TARGETS * 2, strict=True))
]
SETTINGS = {
    "per_device_train_batch_size": 2, "learning_rate": 5e-3, "bf16": False, "gradient_checkpointing": False,
    "report_to": [], "use_cpu": True, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6,
    "disable_tqdm": True, "seed": 11, "packing": True, "max_length": 160,
}  # fmt: skip


def make_trainer(model: Any, output_dir: Path, rows: Any = ROWS, processor: Any = None, **changes: Any) -> SFTTrainer:
    torch.set_num_threads(1)
    eval_dataset, peft_config = changes.pop("eval_dataset", None), changes.pop("peft_config", None)
    args = SFTConfig(**{**SETTINGS, "output_dir": str(output_dir), **changes})
    model = str(model) if isinstance(model, Path) else model
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def train(model: Path, output_dir: Path, changes: dict, kill: dict | None = None) -> None:
    """Start, or resume where checkpoints are; write the hash of the final weights; die where `kill` says."""
    trainer = make_trainer(model, output_dir, **changes)
    if kill:
        trainer.add_callback(Killer(**kill))
    trainer.train(resume_from_checkpoint=any(output_dir.glob("checkpoint-*")) or None)
    (output_dir / "final.txt").write_text(weight_hash(trainer.model.state_dict()))


def in_child(*arguments: Any) -> int:
    """Exit code of `train(*arguments)` in a process of its own; -9 where it killed itself."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["sft.tiny_sft"])
    process = context.Process(target=train, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode
