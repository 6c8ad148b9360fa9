"""What a resume does with the rest of the folder, and what a checkpoint keeps beside weights and optimizer."""

import logging

import pytest
from random_vlm import save_random_vlm
from sft.tiny_sft import make_trainer

from r1v_rl import checkpoints
from r1v_rl.state_files import weight_hash


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
