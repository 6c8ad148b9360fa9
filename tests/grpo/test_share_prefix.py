"""`share_prefix` through the trainer: on where the model can, off with one line that says why where it cannot."""

import pytest
import torch
from grpo.tiny_run import make_trainer
from random_vlm import save_random_vlm

from r1v_rl.grpo import policy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture()
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(policy.logger, "warning", said.append)
    return said


def logged(trainer) -> list[dict]:
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "kl", "reward")
    return [{k: row[k] for k in keys if k in row} for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "beta": 0.1},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_a_run_is_the_same_with_and_without(model, tmp_path, warnings, changes):
    """Loss, gradient norm, entropy and KL of three steps; micro-batches of half a group too."""
    settings = {"max_steps": 3, "save_strategy": "no", **changes}
    runs = []
    for share_prefix in (True, False):
        trainer = make_trainer(model, tmp_path / str(share_prefix), share_prefix=share_prefix, **settings)
        assert trainer.share_prefix is share_prefix
        runs.append(logged(trainer))
    assert len(runs[0]) == 3 and not warnings
    for shared, padded in zip(*runs, strict=True):
        assert shared == pytest.approx(padded, rel=1e-4, abs=1e-6)


def test_lora_dropout_falls_back_with_the_reason(model, tmp_path, warnings):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(model, tmp_path, adapter, trainable=None)
    assert not trainer.share_prefix
    assert len(warnings) == 1 and "lora_dropout" in warnings[0] and "share_prefix" in warnings[0]


def test_lora_without_dropout_shares(model, tmp_path, warnings):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = {"trainable": None, "beta": 0.1, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-3}
    runs = []
    for share_prefix in (True, False):
        torch.manual_seed(0)
        folder = tmp_path / str(share_prefix)
        trainer = make_trainer(model, folder, adapter, share_prefix=share_prefix, **settings)
        assert trainer.share_prefix is share_prefix and not warnings
        runs.append(logged(trainer))
    for shared, padded in zip(*runs, strict=True):
        assert shared == pytest.approx(padded, rel=1e-4, abs=1e-6)
