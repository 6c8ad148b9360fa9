"""GRPO runs of a random tiny model on two processes, under an engine of `recipes/accelerate/`, on recorded rollouts."""

import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from grpo.tiny_run import ROWS, SETTINGS, token_reward
from peft import LoraConfig
from sft.tiny_sft import ROWS as SFT_ROWS
from sft.tiny_sft import SETTINGS as SFT_SETTINGS
from transformers import TrainingArguments

from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.rollout.weights import merged_weights
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.trainer import SFTTrainer
from r1v_rl.state_files import tensor_hash
from r1v_rl.types import Completion

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
_RUN = {
    "max_steps": 20, "save_strategy": "no", "per_device_train_batch_size": 4, "use_cpu": False,
    "adam_epsilon": 1e-4,  # a key's bias has no gradient but noise, which Adam would blow up to whole steps
}  # fmt: skip


_SFT = {
    "max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": 1, "use_cpu": False, "adam_epsilon": 1e-4,
    "dataloader_drop_last": True,  # else the last batch of two processes is filled up with first rows
}  # fmt: skip


class RecordedRollouts:
    """Completions that follow from the row and the step alone, whoever asks, and after a resume too. Every third group
    has equal ones: a process may have nothing that moves the weights, and the other has."""

    def __init__(self, vocabulary: int):
        self._vocabulary, self._version = vocabulary, 0

    def sync_weights(self, policy: Any, version: int = 0) -> None:
        self._version = version

    def generate(self, prompts: list, sampling: Any, *, seed: int) -> list[list[Completion]]:
        return [[self._completion(p, i) for i in range(sampling.num_generations)] for p in prompts]

    def token_logprobs(self, prompts: list, texts: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def _completion(self, prompt: Any, number: int) -> Completion:
        row = int(prompt.example.id.removeprefix("row"))
        number *= (row + self._version + 1) % 3 > 0
        generator = torch.Generator().manual_seed(1000 * (self._version + 1) + 10 * row + number)
        length = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(300, self._vocabulary, (length,), generator=generator).tolist()
        return Completion(token_ids=ids, logprobs=[], text="", is_truncated=False, weight_version=self._version)


def make_trainer(engine: str | None, model: Path, output_dir: Path, changes: dict) -> GRPOTrainer:
    """The trainer of one process; of all of them where `engine` is None: the batch is theirs together."""
    torch.set_num_threads(1)
    changes = _settings(engine, {**_RUN, **changes})
    lora, recorded = changes.pop("lora", None), changes.pop("recorded", True)
    if lora is not None:
        changes["trainable"] = None
    args = GRPOConfig(**{**SETTINGS, "output_dir": str(output_dir), **changes})
    if engine == "fsdp2":
        _ask_for_fsdp(args)
    return GRPOTrainer(
        model=str(model),
        reward_funcs=[token_reward],
        args=args,
        train_dataset=ROWS,
        eval_dataset=[{**row, "answer": "3"} for row in ROWS[:5]],
        peft_config=None if lora is None else LoraConfig(**LORA, **lora),
        engine=RecordedRollouts(vocabulary=330) if recorded else None,
    )


def _settings(engine: str | None, changes: dict) -> dict:
    """What the launcher is for, and the batch of both processes where there is one."""
    if engine is None:
        changes = {**changes, "per_device_train_batch_size": 2 * changes["per_device_train_batch_size"]}
    return {**changes, **({"use_cpu": True} if engine in (None, "ddp", "fsdp2") else {"ddp_backend": "gloo"})}


def _ask_for_fsdp(args: TrainingArguments) -> None:
    """On CPUs accelerate turns FSDP into DDP, unless it is told that the processes have GPUs."""
    from accelerate import PartialState

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def two_processes(engine: str, function: Any, *arguments: Any, limit_s: float = 280) -> None:
    """Run `function(engine, *arguments)` in both processes, in the environment that `accelerate launch` makes.

    Raises:
        AssertionError: If one of them fails, or waits for the other.
    """
    context = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # the server looks for what it preloads there
    context.set_forkserver_preload(["grpo.engine_run"])
    environment = launch_environment(engine)
    processes = [
        context.Process(target=_child, args=(rank, environment, limit_s, engine, function, arguments))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    processes[0].join(limit_s)
    processes[1].join(10)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], f"{engine}: a process failed, or waits for the other: {codes}"


def launch_environment(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/ENGINE.yaml` sets, for two processes in float32."""
    command = ["--config_file", str(RECIPES / f"{engine}.yaml"), "--num_processes", "2", "--mixed_precision", "no", "x"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config or {})
    made = prepare_deepspeed_cmd_env(args)[1] if engine.startswith("zero") else prepare_multi_gpu_env(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {key: value for key, value in made.items() if os.environ.get(key) != value}
    return {**own, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}


def _child(
    rank: int, environment: dict[str, str], limit_s: float, engine: str, function: Any, arguments: tuple
) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    faulthandler.dump_traceback_later(limit_s - 10)  # where it waits
    try:
        if engine.startswith("zero"):
            use_gloo_alone()
        function(engine, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other process may wait for ever
    torch.distributed.destroy_process_group()


def use_gloo_alone() -> None:
    """DeepSpeed would compile a faster all-reduce for processes on one machine first, for a minute."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def exercise(engine: str | None, model: Path, folder: Path, jobs: dict[str, dict]) -> None:
    """All that a test asks of one pair of processes: `train_and_save`, then `roll_out_and_resume`."""
    train_and_save(engine, model, folder, jobs)
    fine_tune(engine, model, folder)
    for name, changes in {
        "resumed": {},
        "resumed-lora": {"lora": {"modules_to_save": ["multi_modal_projector"]}},
    }.items():
        roll_out_and_resume(engine, model, folder / name, changes)


def train_and_save(engine: str | None, model: Path, folder: Path, jobs: dict[str, dict]) -> None:
    """Each job's run, its model (or adapter) in `folder/NAME`, and its losses in `NAME.json` beside it."""
    for name, changes in jobs.items():
        trainer = make_trainer(engine, model, folder / f"{name}-run", changes)
        trainer.train()
        trainer.save_model(str(folder / name))
        if trainer.accelerator.is_main_process:
            losses = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
            (folder / f"{name}.json").write_text(json.dumps(losses))


def make_tuner(engine: str | None, model: Path, output_dir: Path, changes: dict) -> SFTTrainer:
    """As `make_trainer`, for `sft` of packed rows, some of them without pictures."""
    settings = _settings(engine, {**_SFT, **changes})
    args = SFTConfig(**{**SFT_SETTINGS, "output_dir": str(output_dir), **settings})
    if engine == "fsdp2":
        _ask_for_fsdp(args)
    return SFTTrainer(model=str(model), args=args, train_dataset=SFT_ROWS)


def fine_tune(engine: str | None, model: Path, folder: Path) -> None:
    """An `sft` run, its model in `folder/sft`."""
    trainer = make_tuner(engine, model, folder / "sft-run", {})
    trainer.train()
    trainer.save_model(str(folder / "sft"))


def _is_current(trainer: GRPOTrainer) -> bool:
    """Whether the model that samples has the policy's weights; after "through" it was given them several times."""
    sampled = trainer.engine._policy
    if sampled is trainer.model:
        return True
    merged = dict(itertools.chain.from_iterable(block.items() for block in merged_weights(trainer.model)))
    own = (sampled.get_base_model() if hasattr(sampled, "peft_config") else sampled).state_dict()
    return {n: tensor_hash(t) for n, t in own.items()} == {n: tensor_hash(t) for n, t in merged.items()}


def roll_out_and_resume(engine: str | None, model: Path, folder: Path, changes: dict) -> None:
    """A run whose rollouts are its own, and the same from its checkpoint in the middle of a generation; what is seen
    is written by every process."""
    settings = {
        "recorded": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 3, "steps_per_generation": 2,
        "learning_rate": 5e-2, **changes,
    }  # fmt: skip
    seen: dict[str, Any] = {"is_current": True}
    for name in ("through", "again"):
        trainer = make_trainer(engine, model, folder, settings)
        before = trainer.heldout_accuracy() if name == "through" else None
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if name == "again" else None)
        seen[name] = trainer._weight_hash()
        seen["before"] = seen.get("before") or str(before)
        seen["answers"] = [row.completion.token_ids for row in trainer.heldout_answers()]
        seen["is_current"] &= _is_current(trainer)
    trainer.save_model(str(folder / "model"))
    rank = trainer.accelerator.process_index
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
