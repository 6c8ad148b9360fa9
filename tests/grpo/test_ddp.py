"""Two processes (DDP over gloo): packed rows in several passes, skipped completions, a frozen tower run ahead."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from grpo.tiny_run import ROWS, SETTINGS
from random_vlm import save_random_vlm

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.state_files import weight_hash


def equal_on_one_process(completion_ids, **_) -> list[float]:
    """All rewards of process 0 are equal: it has nothing to run, and process 1 has."""
    if os.environ["RANK"] == "0":
        return [0.3] * len(completion_ids)
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def _train(rank: int, port: int, model: Path, folder: Path, changes: dict) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    args = {**SETTINGS, "output_dir": str(folder), "save_strategy": "no", "max_steps": 3, **changes}
    trainer = GRPOTrainer(
        model=str(model), reward_funcs=[equal_on_one_process], args=GRPOConfig(**args), train_dataset=ROWS
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    (folder / f"rank{rank}.json").write_text(json.dumps({"rows": rows, "weights": weight_hash(weights)}))


def two_processes(model: Path, folder: Path, **changes) -> list[dict]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_train, args=(rank, port, model, folder, changes)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], "a process failed, or waits for the other"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_agree_with_and_without_sharing_and_skipping(tmp_path):
    """Process 0 has no row that moves anything; both must still make the same calls, and end with the same weights."""
    model = save_random_vlm(tmp_path / "model")
    ours = two_processes(model, tmp_path / "ours", max_tokens_per_forward=60)
    plain = two_processes(model, tmp_path / "plain", share_prefix=False, skip_zero_advantage=False)
    assert ours[0]["weights"] == ours[1]["weights"] and plain[0]["weights"] == plain[1]["weights"]
    for mine, other in zip(ours[0]["rows"], plain[0]["rows"], strict=True):
        assert mine["skipped_completions"] > 0.4
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
