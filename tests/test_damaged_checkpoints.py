"""Every file of a real checkpoint, removed, cut, emptied and with one bit flipped: found, named, and passed over.

Checkpoints of several ranks: `grpo/test_engines.py`.
"""

import logging
import shutil

import pytest
from damage import FAULTS, damaged
from grpo import tiny_run
from peft import LoraConfig
from random_vlm import save_random_vlm
from sft import tiny_sft

from r1v_rl import checkpoints
from r1v_rl.errors import CheckpointError

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
RUNS = {
    "grpo": (tiny_run.make_trainer, {"steps_per_generation": 4}),
    "grpo, lora": (tiny_run.make_trainer, {"peft_config": LORA, "trainable": None}),
    "sft": (tiny_sft.make_trainer, {}),
    "align": (tiny_sft.make_trainer, {"trainable": ["projector"], "vision_features": "cache"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", RUNS)
def test_every_damaged_file_is_named_and_the_last_good_checkpoint_is_taken(model, tmp_path, caplog, name):
    make_trainer, changes = RUNS[name]
    trainer = make_trainer(model, tmp_path, max_steps=3, **changes)
    trainer.train()
    newest, before = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-1")
    seen = set()
    for file, fault in damaged(newest):
        seen.add(file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert trainer._checkpoint_to_resume(True) == before, (file, fault)
        assert f"{newest} is not complete and is passed over: {file}" in caplog.text, fault
        with pytest.raises(CheckpointError, match=f"{newest} is not a complete checkpoint: {file}"):
            trainer._checkpoint_to_resume(str(newest))
    assert trainer._checkpoint_to_resume(True) == newest, "undamaged again"
    weights = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert {weights, "state/rank-0.json", "state/rank-0.safetensors", "trainer_state.json", "manifest.json"} <= seen
    print(f"{name}: {len(seen)} files, {len(FAULTS)} kinds of damage each, all named")
    (before / "state" / "rank-0.json").unlink()
    (newest / weights).unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert checkpoints.checkpoint_folders(tmp_path) == [newest, before], "nothing is deleted"
