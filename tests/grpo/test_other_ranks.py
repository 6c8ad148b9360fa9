"""Checkpoints of two ranks resumed by one, and of one by two: the weights of the run that was not interrupted."""

from pathlib import Path

import pytest
from grpo.engine_run import two_processes
from grpo.other_ranks_run import JOBS, refused, resume, save_and_resume
from random_vlm import save_random_vlm
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    save_and_resume(None, save_random_vlm(folder / "model"), folder, None)
    return folder


def weights(folder: Path) -> dict:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_another_number_of_ranks_goes_on_as_the_first_would_have(engine, alone, tmp_path, caplog):
    two_processes(engine, save_and_resume, alone / "model", tmp_path, alone)
    for job in JOBS:
        resume(None, alone / "model", tmp_path / "one", job, tmp_path)
        wanted = weights(alone / f"{job}-through")
        for folder in (tmp_path / f"{job}-through", tmp_path / f"{job}-resumed", tmp_path / "one" / f"{job}-resumed"):
            found = weights(folder)
            assert set(found) == set(wanted), folder
            for name, tensor in found.items():
                assert (tensor - wanted[name]).abs().max() <= 1e-5, f"{folder}: {name}"
    said = [record.message for record in caplog.records if "was written by" in record.message]
    assert len(said) == len(JOBS)
    assert said[0].startswith("checkpoint-3 was written by 2 ranks, this run has 1: weights, optimizer, schedule")
