"""Exact resume: a run that was killed goes on as if nothing had happened, to the last bit, or refuses with a reason."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from r1v_rl import checkpoints
from r1v_rl.errors import CheckpointError
from r1v_rl.grpo.batch import GenerationBatch
from r1v_rl.grpo.callbacks import StopOnSignal
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.metrics import Metrics
from r1v_rl.grpo.sampler import MicroSteps, PromptSampler
from r1v_rl.models.parts import part_hashes
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.state_files import load_state, save_state, weight_hash
from r1v_rl.tracking.completions import RolloutStore
from r1v_rl.types import Example

_MUST_AGREE = (
    "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_iterations", "max_completion_length", "temperature", "loss_type", "beta", "seed", "data_seed",
    "shuffle_dataset", "trainable", "learning_rate", "optim", "use_vllm",
)  # fmt: skip
_TRAINER_STATE = "trainer_state.json"


class ExactResume(Trainer):
    """The checkpoints of `GRPOTrainer`.

    A checkpoint holds the model as transformers writes it, and beside it the optimizer, the schedule, the random
    states, the sampler's position, the buffered rollouts and (where it moves) the reference, as safetensors and JSON.
    """

    args: GRPOConfig
    train_examples: Sequence[Example]
    sampler: PromptSampler
    metrics: Metrics
    control: TrainerControl
    optimizer: Any
    ref_model: Any
    rollout_store: RolloutStore | None
    _buffer: GenerationBatch | None
    _buffered_generation: int
    _micro_step: int
    _stop: StopOnSignal
    _random_states: dict

    def _encode(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
        """The examples' prompts, images decoded and processed once."""
        device, kwargs = self.accelerator.device, self.args.chat_template_kwargs
        return [encode_prompt(self.processing_class, e, device=device, template_kwargs=kwargs) for e in examples]

    # ---- save -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process:
            checkpoints.begin(target)
        self.accelerator.wait_for_everyone()
        folder = checkpoints.temporary_path(target)
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            save_state(folder / f"rank-{self.accelerator.process_index}", self._exact_state())
        if self.accelerator.is_main_process:
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(target.parent / f"checkpoint-{self.state.best_global_step}")
            self.state.save_to_json(str(folder / _TRAINER_STATE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            meta = {"step": self.state.global_step, "weights": self._weight_hash(), "run": self._fingerprint()}
            checkpoints.commit(folder, target, meta)
            checkpoints.prune(target.parent, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink()  # a pickle; config.yaml says it all

    def _exact_state(self) -> dict:
        return {
            "micro_step": self._micro_step,
            "num_tokens": self.metrics.num_tokens,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "random": _random_states(),
            "buffer": self._buffer_state(),
            "reference": dict(self.ref_model.state_dict()) if self.args.sync_ref_model else None,
        }

    def _buffer_state(self) -> dict | None:
        """The rollouts that are not used up; their prompts follow from the sampler."""
        used_up = self._micro_step % self.sampler.micro_steps_per_generation == 0
        if self._buffer is None or used_up:
            return None
        names = [name for name in GenerationBatch.__slots__ if name != "prompts"]
        return {
            "generation": self._buffered_generation,
            "fields": {name: getattr(self._buffer, name) for name in names},
        }

    # ---- resume ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """As in transformers; `True` takes the newest complete checkpoint and names those it passes over.

        Raises:
            CheckpointError: No complete checkpoint, or one of a run that this recipe does not continue.
        """
        if self.accelerator.is_main_process:
            checkpoints.clean_leftovers(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._checkpoint_to_resume(resume_from_checkpoint))
            if self._is_finished(resume_from_checkpoint):
                self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(self.state.global_step, 0.0, {})
        elif self.rollout_store is not None:
            self.rollout_store.forget_after(-1)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self._stop.restore()

    def _checkpoint_to_resume(self, wanted: str | bool) -> Path:
        if isinstance(wanted, bool):
            found = checkpoints.latest_complete(self.args.output_dir)
            if found is None:
                raise CheckpointError(
                    f"resume_from_checkpoint is true, but {self.args.output_dir} holds no complete checkpoint: "
                    f"start anew without it, or name a checkpoint folder"
                )
        else:
            found = Path(wanted)
            if problems := checkpoints.verify(found):
                raise CheckpointError(f"{found} is not a complete checkpoint: " + "; ".join(problems[:5]))
        then, now = checkpoints.read_meta(found)["run"], self._fingerprint()
        changed = [
            f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in now if json.dumps(then.get(k)) != json.dumps(now[k])
        ]
        if changed:
            raise CheckpointError(
                f"{found} belongs to another run, and cannot be continued exactly: " + "; ".join(changed)
            )
        return found

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the run had taken all its steps; transformers would take one more."""
        planned = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        state = TrainerState.load_from_json(str(Path(checkpoint) / _TRAINER_STATE))
        if state.global_step >= planned:
            self.state = state
        return state.global_step >= planned

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights and hold them against the hash that was taken when they were saved.

        transformers would load the files as they lie, whose keys are not those of the modules, and go on from the
        initial weights without an error.
        """
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        if hasattr(policy, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            dtype = next(policy.parameters()).dtype
            saved = AutoModelForImageTextToText.from_pretrained(resume_from_checkpoint, dtype=dtype)
            policy.load_state_dict(saved.state_dict())
        wanted = checkpoints.read_meta(resume_from_checkpoint)["weights"]
        if self._weight_hash() != wanted:
            raise CheckpointError(f"the weights loaded from {resume_from_checkpoint} are not those that were saved")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        prefix = Path(checkpoint) / f"rank-{self.accelerator.process_index}"
        if not list(prefix.parent.glob(prefix.name + "*")):
            raise CheckpointError(f"{checkpoint} holds weights only (`save_only_model`): it cannot be resumed")
        state = load_state(prefix)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._micro_step = state["micro_step"]
        self.metrics.num_tokens = state["num_tokens"]
        self._random_states = state["random"]
        if self.rollout_store is not None:
            self.rollout_store.forget_after((self._micro_step - 1) // self.sampler.micro_steps_per_generation)
        if state["reference"] is not None:
            self.ref_model.load_state_dict(state["reference"])
        if state["buffer"] is not None:
            self._restore_buffer(state["buffer"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        random.setstate(self._random_states["python"])
        numpy.random.set_state(self._random_states["numpy"])
        torch.set_rng_state(self._random_states["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random_states["cuda"])

    def _restore_buffer(self, state: dict) -> None:
        generation = state["generation"]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = self._encode([self.train_examples[i] for i in self.sampler.prompts(generation, rank, world)])
        self._buffer = GenerationBatch(prompts=prompts, **state["fields"])
        self._buffered_generation = generation

    # ---- what must agree --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Micro-steps: what each of them trains on follows from its number alone."""
        return DataLoader(MicroSteps(self.sampler), batch_size=1, collate_fn=lambda items: items[0])

    def _weight_hash(self) -> str:
        return weight_hash(self.accelerator.unwrap_model(self.model).state_dict())

    def part_hashes(self) -> dict[str, str]:
        """A hash of the weights of each part: a frozen one keeps its own through a run."""
        return part_hashes(self.accelerator.unwrap_model(self.model))

    def data_hash(self) -> str:
        """A hash of the training rows' ids, prompts and answers."""
        rows = [[e.id, e.answer, e.messages] for e in self.train_examples]
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()

    def _fingerprint(self) -> dict:
        """What a run must have in common with the one it continues."""
        settings = {key: getattr(self.args, key) for key in _MUST_AGREE}
        return {**settings, "num_processes": self.accelerator.num_processes, "data": self.data_hash()}


def _random_states() -> dict:
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
