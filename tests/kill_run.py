"""Training commands that are killed at random times until they are done."""

import hashlib
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from ranks import Ranks, launch
from sft.iterate_run import RECIPE as ITERATE

from r1v_rl import cli

_REWARD = '''"""A reward that depends on what was sampled."""


def token_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
'''
_COMMON = {
    "dataset_name": "scenes", "dataset_size": 16, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
    "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "report_to": "none",
    "learning_rate": 5e-3, "seed": 3, "disable_tqdm": True,
}  # fmt: skip
_CHAINS = {"dataset_kwargs": {"chains": "mixed", "num_images": 1}, "max_length": 512, "per_device_train_batch_size": 4}
RECIPES = {
    "align": {**_COMMON, **_CHAINS, "max_steps": 40},
    "sft": {**_COMMON, **_CHAINS, "max_steps": 40, "trainable": ["projector", "language_model"]},
    "grpo": {
        **_COMMON, "dataset_kwargs": {"num_images": 1}, "max_steps": 16, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 8, "trainable": ["projector", "language_model"],
        "save_rollouts": False,
    },
    "iterate": {
        **ITERATE, "scorer": "rewards/scene_scores.py:scene_scores", "num_resamples": 1,
        "dataset_kwargs": {"chains": "mixed", "num_images": 1},
    },
}  # fmt: skip
ROOT = Path(__file__).parents[1]


@dataclass
class Kills:
    """What became of a stage that was killed so often."""

    kills: int = 0
    resumed: int = 0
    """Launches that went on from a checkpoint (or, for `iterate`, from files) of a killed one."""
    finished: int = 0
    identical: int = 0
    """Of the finished ones: those whose weights are those of the undisturbed run, to the last bit."""
    slowest_end_s: float = 0.0
    """From a kill to the end of the last rank."""


def kill_at_random(stage: str, ranks: int, model: Path, folder: Path, *, kills: int, seed: int) -> Kills:
    """Run `stage` undisturbed; then again and again, killing it at random times (any rank, or all of them), each launch
    going on where the last one was, until there were so many kills and the last run is finished."""
    whole, started = _launch(stage, ranks, model, folder / "whole"), time.monotonic()
    assert set(whole.wait(600)) == {0}, whole.said()
    seconds, wanted = time.monotonic() - started, _weights(folder / "whole")
    rng, seen, number = random.Random(seed), Kills(), 0
    while True:
        output = folder / f"run-{number}"
        seen.resumed += _has_begun(output, stage)
        run = _launch(stage, ranks, model, output)
        codes = run.wait(rng.uniform(0, seconds) if seen.kills < kills else 600)
        if None not in codes:
            assert set(codes) == {0}, run.said()
            seen.finished, number = seen.finished + 1, number + 1
            seen.identical += _weights(output) == wanted
            assert not run.left()
            if seen.kills >= kills:
                return seen
            continue
        assert seen.kills < kills, f"it hangs: {run.said()}"
        for rank in rng.choice([[0], [1], [0, 1]]) if ranks > 1 else [0]:
            run.processes[rank].kill()
        killed = time.monotonic()
        codes = run.wait(120)
        assert None not in codes and -signal.SIGKILL in codes, (codes, run.said())
        seen.kills += 1
        while run.left() and time.monotonic() < killed + 120:
            time.sleep(0.1)
        assert not run.left(), "a process stays behind"
        seen.slowest_end_s = max(seen.slowest_end_s, time.monotonic() - killed)


def _launch(stage: str, ranks: int, model: Path, output: Path) -> Ranks:
    output.mkdir(parents=True, exist_ok=True)
    keys = {**RECIPES[stage], "model_name_or_path": str(model), "output_dir": str(output / "out")}
    if stage == "grpo":
        (output / "reward.py").write_text(_REWARD)
        keys["reward_funcs"] = [f"{output}/reward.py:token_reward"]
    if stage == "iterate" and ranks > 1:
        keys["accelerate_config"] = str(output / "ddp.yaml")
        launch_file = yaml.safe_load((ROOT / "recipes/accelerate/ddp.yaml").read_text())
        launch_file |= {"num_processes": ranks, "mixed_precision": "no", "use_cpu": True, "main_process_port": 0}
        (output / "ddp.yaml").write_text(yaml.safe_dump(launch_file))
    if stage != "iterate" and _has_begun(output, stage):
        keys["resume_from_checkpoint"] = "true"
    (output / "recipe.yaml").write_text(yaml.safe_dump(keys))
    engine = "ddp" if ranks > 1 and stage != "iterate" else None
    return launch(engine, output, cli.main, [stage, "--config", str(output / "recipe.yaml")])


def _has_begun(output: Path, stage: str) -> bool:
    return any((output / "out").glob("round-*" if stage == "iterate" else "checkpoint-*"))


def _weights(output: Path) -> str:
    return hashlib.sha256((output / "out" / "model.safetensors").read_bytes()).hexdigest()
