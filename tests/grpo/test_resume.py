"""A run that was killed ends with the weights of one that was not, to the last bit."""

import resource
import signal

import pytest
from grpo.tiny_run import in_child, make_trainer
from killer import Killer
from random_vlm import save_random_vlm

from r1v_rl.errors import CheckpointError

CONFIGURATIONS = {
    "plain": {},
    "steps_per_generation=4": {"steps_per_generation": 4},
    "num_iterations=2, judged early": {"num_iterations": 2, "early": True},
    "both, accumulation": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "num_iterations": 2,
    },
    "sync_ref_model": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "num_iterations": 2},
    "lora with dropout": {"lora": True, "num_iterations": 2},
}
"""Eight prompts, two or eight a generation: six steps go past the first epoch but where a generation is used twice."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def uninterrupted(model, folder, changes) -> str:
    assert in_child(model, folder, changes) == 0
    return (folder / "final.txt").read_text()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_after_every_step(model, tmp_path, name):
    changes = CONFIGURATIONS[name]
    wanted = uninterrupted(model, tmp_path / "whole", changes)
    for step in range(1, 6):
        kill = {"step": step, "moment": "after save"}
        assert in_child(model, tmp_path / "killed", changes, kill) == -signal.SIGKILL
    assert uninterrupted(model, tmp_path / "killed", changes) == wanted


@pytest.mark.parametrize("name", ["plain", "steps_per_generation=4"])
def test_killed_before_every_save(model, tmp_path, name):
    """Each time the step since the last checkpoint is lost and done again."""
    changes = CONFIGURATIONS[name]
    wanted = uninterrupted(model, tmp_path / "whole", changes)
    for step in range(2, 6):
        assert in_child(model, tmp_path / "killed", changes, {"step": step - 1, "moment": "after save"}) == -9
        assert in_child(model, tmp_path / "killed", changes, {"step": step, "moment": "before save"}) == -9
    assert uninterrupted(model, tmp_path / "killed", changes) == wanted


def test_killed_inside_a_save_at_every_write(model, tmp_path):
    changes = {"max_steps": 3, "num_iterations": 2}
    wanted = uninterrupted(model, tmp_path / "whole", changes)
    nth = 0
    while True:
        folder = tmp_path / f"killed{nth}"
        exit_code = in_child(model, folder, changes, {"step": 2, "moment": "inside save", "nth": nth})
        if exit_code == 0:
            break  # the save opens fewer files than that
        assert exit_code == -signal.SIGKILL
        assert uninterrupted(model, folder, changes) == wanted, f"killed at write {nth} of the save"
        nth += 1
    assert nth > 10, f"only {nth} writes seen: the hook misses the save"


def test_a_disk_that_is_full_ends_the_run_and_takes_nothing_with_it(model, tmp_path):
    changes, before = {"max_steps": 3}, resource.getrlimit(resource.RLIMIT_FSIZE)
    wanted = uninterrupted(model, tmp_path / "whole", changes)
    trainer = make_trainer(model, tmp_path / "full", **changes)
    trainer.add_callback(Killer(step=2, moment="full disk"))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written \(.*GiB are free there"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in (tmp_path / "full").iterdir() if path.is_dir())
    assert left == ["checkpoint-1"], "half a checkpoint would fill what is left"
    assert uninterrupted(model, tmp_path / "full", changes) == wanted


def test_killed_with_rollouts_by_vllm(model, tmp_path):
    """The engine starts anew, with empty caches; what it samples follows from weights, prompts and seed."""
    vllm = {"use_vllm": True, "vllm_kv_cache_memory_bytes": 2**27, "vllm_max_model_length": 256, "max_steps": 4}
    changes = {**vllm, "num_iterations": 2}
    wanted = uninterrupted(model, tmp_path / "whole", changes)
    for step in (1, 2):
        assert in_child(model, tmp_path / "killed", changes, {"step": step, "moment": "after save"}) == -9
    assert uninterrupted(model, tmp_path / "killed", changes) == wanted


def test_a_finished_run_resumes_to_nothing(model, tmp_path):
    wanted = uninterrupted(model, tmp_path / "run", {"max_steps": 2})
    assert uninterrupted(model, tmp_path / "run", {"max_steps": 2}) == wanted
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
