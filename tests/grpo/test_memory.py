"""The memory of a run is flat: nothing is kept from step to step."""

import multiprocessing
import os
from pathlib import Path

from grpo.tiny_run import make_trainer
from random_vlm import save_random_vlm
from transformers import TrainerCallback

STEPS, SETTLED, ALLOWED_MB = 200, 50, 12


class _Memory(TrainerCallback):
    def __init__(self) -> None:
        self.resident_mb: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def _run(model: Path, output_dir: Path, results) -> None:
    memory = _Memory()
    vllm = {"use_vllm": True, "vllm_kv_cache_memory_bytes": 2**27, "vllm_max_model_length": 256}
    trainer = make_trainer(model, output_dir, max_steps=STEPS, save_strategy="no", save_rollouts=True, **vllm)
    trainer.add_callback(memory)
    trainer.train()
    results.send(memory.resident_mb)


def test_memory_is_flat_over_200_steps(tmp_path):
    """vLLM, rollouts to parquet and all; after the first steps, when caches are warm, at most a few MB more."""
    model = save_random_vlm(tmp_path / "model")
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(model, tmp_path / "run", sender))
    process.start()
    sender.close()
    measured = receiver.recv()
    process.join(30)
    assert len(measured) == STEPS
    growth = max(measured[SETTLED:]) - measured[SETTLED]
    assert growth < ALLOWED_MB, f"{growth:.1f} MB more from step {SETTLED} to {STEPS}: {measured[::20]}"
