"""What a resume does with the rest of the folder, and what a checkpoint keeps beside weights and optimizer."""

import json
import logging
import os
import signal

import pytest
import torch
from grpo import tiny_run
from random_vlm import save_random_vlm
from sft.tiny_sft import make_trainer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from r1v_rl import checkpoints
from r1v_rl.errors import CheckpointError, RecipeError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.sft.config import SFTConfig
from r1v_rl.state_files import weight_hash
from r1v_rl.training.other_ranks import refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def test_from_a_named_checkpoint_a_run_takes_another_course_and_keeps_to_it(model, tmp_path, caplog):
    make_trainer(model, tmp_path, max_steps=4).train()
    again = make_trainer(model, tmp_path, max_steps=3, save_total_limit=1)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    aside = [f"checkpoint-{step}.replaced-1" for step in (2, 3, 4)]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [*aside[:1], "checkpoint-3", *aside[1:]]
    assert all(checkpoints.verify(tmp_path / name) == [] for name in aside)
    assert f"kept in {tmp_path} as {', '.join(aside)}" in caplog.text
    assert make_trainer(model, tmp_path)._checkpoint_to_resume(True) == tmp_path / "checkpoint-3"


def test_from_the_newest_checkpoint_nothing_is_set_aside(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    again = make_trainer(model, tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert weight_hash(again.model.state_dict()) == weight_hash(trainer.model.state_dict())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_the_scale_of_fp16_gradients_goes_on(model, tmp_path):
    """The scaler of a CPU: it grows at every second step."""

    def train(resume):
        trainer = make_trainer(model, tmp_path, max_steps=3)
        scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        trainer.train(resume_from_checkpoint=resume)
        return scaler.state_dict(), weight_hash(trainer.model.state_dict())

    wanted = train(None)
    assert (wanted[0]["scale"], wanted[0]["_growth_tracker"]) == (16.0, 1)
    assert train(str(tmp_path / "checkpoint-1")) == wanted


class CountSteps(TrainerCallback, ExportableState):
    def __init__(self, count: int = 0):
        self.count = count

    def on_step_end(self, *_, **__):
        self.count += 1

    def state(self):
        return {"args": {"count": self.count}, "attributes": {}}


def test_what_callbacks_keep_is_of_the_step_that_was_saved(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=2)
    for count in (0, 10):
        trainer.add_callback(CountSteps(count))
    trainer.train()
    for step in (1, 2):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [one["args"]["count"] for one in state["stateful_callbacks"]["CountSteps"]] == [step, 10 + step]
    resumed = make_trainer(model, tmp_path, max_steps=3, restore_callback_states_from_checkpoint=True)
    resumed.add_callback(CountSteps())
    resumed.add_callback(CountSteps())
    resumed.train(resume_from_checkpoint=True)
    assert [c.count for c in resumed.callback_handler.callbacks if isinstance(c, CountSteps)] == [3, 13]


@pytest.mark.parametrize("config", [GRPOConfig, SFTConfig])
def test_checkpoints_are_not_pushed(tmp_path, config):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "hub_model_id": "a/b"}
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        config(**settings, hub_strategy=strategy)
        with pytest.raises(RecipeError, match=f"`hub_strategy: {strategy}` would push.*set `hub_strategy: end`"):
            config(**settings, hub_strategy=strategy, push_to_hub=True)
    assert config(**settings, hub_strategy="end", push_to_hub=True).push_to_hub


class Interrupt(TrainerCallback):
    """Ctrl-C in the first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_was_stopped_goes_on_in_the_same_process(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=3)
    trainer.add_callback(Interrupt())
    trainer.train()
    assert (trainer.stopped_by, trainer.state.global_step) == (signal.SIGINT, 1)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.stopped_by, trainer.state.global_step) == (None, 3)
    trainer._stop.received = signal.SIGINT
    trainer.train(resume_from_checkpoint=True)
    assert trainer.stopped_by is None, "nothing was left to be stopped"


SHARED = {
    "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.5, "max_grad_norm": 0.5, "adam_beta2": 0.5,
    "projector_learning_rate": 1e-3, "chat_template_kwargs": {"a": 1},
}  # fmt: skip
OF_GRPO = {
    "epsilon": 0.1, "epsilon_high": 0.3, "scale_rewards": "none", "reward_weights": [2.0], "top_p": 0.5, "top_k": 3,
    "mask_truncated_completions": True, "entropy_coef": 0.1, "generation_kwargs": {"seed": 1}, "answer_kind": "text",
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "changes"),
    [(tiny_run.make_trainer, {**SHARED, **OF_GRPO}), (make_trainer, SHARED)],
    ids=["grpo", "sft"],
)
def test_what_the_weights_follow_from_must_be_as_it_was(model, tmp_path, make, changes):
    trainer = make(model, tmp_path, max_steps=1)
    trainer.args.chat_template_kwargs = {"b": 1, "a": 2}  # in no order
    trainer.train()
    for key, value in changes.items():
        was = getattr(trainer.args, key)
        setattr(trainer.args, key, value)
        with pytest.raises(CheckpointError, match=rf"belongs to another run.*: {key} was [^<>]+, is [^<>]+$"):
            trainer._checkpoint_to_resume(True)
        setattr(trainer.args, key, was)
    for key, value in {"max_steps": 9, "num_train_epochs": 9, "save_steps": 9, "output_dir": str(tmp_path)}.items():
        setattr(trainer.args, key, value)
    assert trainer._checkpoint_to_resume(True) == tmp_path / "checkpoint-1"


def test_the_reward_functions_must_be_the_same(model, tmp_path):
    tiny_run.make_trainer(model, tmp_path, max_steps=1).train()
    other = tiny_run.make_trainer(model, tmp_path, reward=tiny_run.early_token_reward)
    with pytest.raises(CheckpointError, match=r"reward_funcs was \['token_reward'\], is \['early_token_reward'\]"):
        other._checkpoint_to_resume(True)
    other.reward_stage = RewardStage([tiny_run.token_reward], other.args)
    assert other._checkpoint_to_resume(True) == tmp_path / "checkpoint-1"


def test_a_key_that_an_earlier_version_did_not_write_down_is_no_reason():
    now = {"num_processes": 1, "engine": None, "data": "a", "epsilon": 0.2}
    then = {key: value for key, value in now.items() if key != "epsilon"}
    assert refusal(then, now, {}) == ""
    assert "data was 'b', is 'a'" in refusal({**then, "data": "b"}, now, {})
