"""Two processes (gloo, CPU) under DDP, FSDP2, ZeRO-2 and ZeRO-3, launched with the files of `recipes/accelerate/`."""

import json
from pathlib import Path

import pytest
import torch
from damage import damaged
from grpo.engine_run import ENGINES, exercise, fine_tune, make_trainer, train_and_save, two_processes
from random_vlm import save_random_vlm
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from r1v_rl import checkpoints
from r1v_rl.errors import CheckpointError

JOBS: dict[str, dict] = {
    "projector": {"trainable": ["projector"], "max_tokens_per_forward": 60},
    "whole": {"max_tokens_per_forward": 60, "beta": 0.04, "gradient_accumulation_steps": 2},
    "lora": {"lora": {"modules_to_save": ["multi_modal_projector"]}, "beta": 0.04, "share_prefix": False},
}
"""20 steps each, on rows with one, two and no pictures: in passes that are not as many on both processes, with nothing
to run on one of them, with a reference of its own, and with the policy without its adapter as reference."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same runs by one process, with the batch of both."""
    folder = tmp_path_factory.mktemp("alone")
    train_and_save(None, save_random_vlm(folder / "model"), folder, JOBS)
    fine_tune(None, folder / "model", folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_save_roll_out_and_resume_as_one_does(engine, alone, tmp_path):
    two_processes(engine, exercise, alone / "model", tmp_path, JOBS)
    for job in (*JOBS, "sft"):
        ours, wanted = (load_file(next((folder / job).glob("*.safetensors"))) for folder in (tmp_path, alone))
        assert set(ours) == set(wanted), job
        for name, tensor in ours.items():
            assert (tensor - wanted[name]).abs().max() <= 1e-5, f"{job}: {name}"
    for job in JOBS:
        losses, wanted_losses = (json.loads((folder / f"{job}.json").read_text()) for folder in (tmp_path, alone))
        assert len(losses) == 20
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses), atol=1e-4, rtol=1e-4)
    for run in ("resumed", "resumed-lora"):
        seen, other = (json.loads((tmp_path / run / f"seen-{rank}.json").read_text()) for rank in (0, 1))
        assert seen == other, "processes disagree"
        assert seen["again"] == seen["through"], "the resumed run ends with other weights"
        assert seen["is_current"], "rollouts do not use the policy's weights"
        assert len(seen["answers"]) == 5
    checkpoint, seen_files = tmp_path / "resumed" / "checkpoint-3", set()
    if engine.startswith("zero"):
        one = make_trainer(None, alone / "model", tmp_path / "one", {})
        with pytest.raises(CheckpointError, match=f"by 2 ranks under {engine}.* launch with `--num_processes 2`"):
            one.train(resume_from_checkpoint=str(checkpoint))
    for file, fault in damaged(checkpoint):
        seen_files.add(file)
        assert checkpoints.verify(checkpoint)[0].startswith(file), (file, fault)
    assert {f"state/rank-{rank}.{end}" for rank in (0, 1) for end in ("json", "safetensors")} < seen_files
    assert checkpoints.verify(checkpoint) == []
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "resumed" / "model")
    assert model.config.architectures == ["InternVLForConditionalGeneration"]
