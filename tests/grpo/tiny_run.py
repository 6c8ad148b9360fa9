"""A GRPO run of a random tiny model, in a process that a test can kill; run by a preloaded fork server."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from killer import Killer
from random_vlm import picture

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.state_files import weight_hash

_SIZES = [[(32, 32)], [], [(64, 32), (32, 32)], [(32, 64)]]  # one tile, text only, two pictures, two tiles
ROWS = [
    {
        "id": f"row{i}",
        "prompt": [{"role": "user", "content": f"How many red {shape}?"}],
        "images": [picture(i, *size) for size in sizes],
    }
    for i, (sizes, shape) in enumerate(zip(_SIZES * 2, ["circles", "squares", "triangles", "shapes"] * 2, strict=True))
]
HELDOUT = [{**row, "id": f"held-out {i}", "answer": "3", "images": [picture(50 + i)]} for i, row in enumerate(ROWS[:3])]
SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "learning_rate": 5e-3,
    "bf16": False, "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "disable_tqdm": True, "save_rollouts": False,
    "trainable": ["projector", "language_model"], "seed": 11,
}  # fmt: skip


def token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Any function of the tokens will do: the run must depend on what was sampled."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def early_token_reward(**arguments: Any) -> list[float]:
    """The same, asked while others are sampled."""
    return token_reward(**arguments)


early_token_reward.per_completion = True  # type: ignore[attr-defined]


def make_trainer(
    model: Path,
    output_dir: Path,
    peft_config: Any = None,
    rows: list[dict] = ROWS,
    reward: Any = token_reward,
    **changes: Any,
) -> GRPOTrainer:
    torch.set_num_threads(1)
    args = GRPOConfig(**{**SETTINGS, "output_dir": str(output_dir), **changes})
    measures = args.eval_strategy != "no" or args.grounding_every
    return GRPOTrainer(
        model=str(model),
        reward_funcs=[reward],
        args=args,
        train_dataset=rows,
        eval_dataset=HELDOUT if measures else None,
        peft_config=peft_config,
    )


def train(model: Path, output_dir: Path, changes: dict, kill: dict | None = None) -> None:
    """Start, or resume where checkpoints are; write the hash of the final weights; die where `kill` says."""
    changes = dict(changes)
    peft_config = None
    if changes.pop("lora", False):
        from peft import LoraConfig

        changes["trainable"] = None
        peft_config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    reward = early_token_reward if changes.pop("early", False) else token_reward
    trainer = make_trainer(model, output_dir, peft_config, reward=reward, **changes)
    if changes.get("max_staleness"):
        from grpo.background import BackgroundTransformers

        BackgroundTransformers(trainer)
    if kill:
        trainer.add_callback(Killer(**kill))
    resume = any(output_dir.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume or None)
    (output_dir / "final.txt").write_text(weight_hash(trainer.model.state_dict()))


def in_child(*arguments: Any) -> int:
    """Exit code of `train(*arguments)` in a process of its own; -9 where it killed itself."""
    context = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # the server looks for what it preloads there
    context.set_forkserver_preload(["grpo.tiny_run"])
    process = context.Process(target=train, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode
