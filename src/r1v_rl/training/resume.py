"""Exact resume: a run that was killed goes on as if nothing had happened, to the last bit, or refuses with a reason."""

import logging
import math
import random
import shutil
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoModelForImageTextToText, Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from r1v_rl import checkpoints
from r1v_rl.errors import CheckpointError, UserError
from r1v_rl.models.sharding import (
    hashes_by_part,
    is_sharded,
    load_whole,
    whole_hashes,
    whole_models_made,
    whole_state,
)
from r1v_rl.models.weight_files import load_weights
from r1v_rl.recipe_values import plain
from r1v_rl.state_files import combined_hash, load_state, save_state
from r1v_rl.training.engines import check_engine, engine_name
from r1v_rl.training.other_ranks import ACCUMULATION, ENGINE, PER_DEVICE, RANKS, Rows, ranks, refusal
from r1v_rl.training.ranks import watched_ranks
from r1v_rl.training.shard_states import adapter_weights, load_optimizer_state, optimizer_state, shared_optimizer_state
from r1v_rl.training.signals import StopOnSignal

logger = logging.getLogger(__name__)

_TRAINER_STATE = "trainer_state.json"
KEYS_OF_AN_UPDATE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "trainable", "learning_rate",
    "projector_learning_rate", "vision_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm",
    "neftune_noise_alpha", "bf16", "fp16", "loss_type", "seed", "data_seed", "shuffle_dataset", "chat_template_kwargs",
)  # fmt: skip
"""What every trainer's weights follow from, beside the rows and the number of steps, which a run may prolong."""


class ExactResume(Trainer):
    """The checkpoints of every trainer of ours.

    A checkpoint holds the model as transformers writes it, and beside it the optimizer, the schedule, the random
    states and what a trainer adds to `_exact_state`, as safetensors and JSON.
    """

    must_agree: ClassVar[tuple[str, ...]] = ()
    """Keys of the recipe that a run must have in common with the one it continues."""

    control: TrainerControl
    optimizer: Any
    _stop: StopOnSignal
    _random_states: dict | None

    def data_hash(self) -> str:
        """A hash of the training rows."""
        raise NotImplementedError

    def rows_on_any_ranks(self) -> Rows:
        """What a run on another number of ranks must have in common with this one; see `other_ranks.refusal`."""
        return {"the rows of an update": (PER_DEVICE, ACCUMULATION, RANKS)}

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run before its time, or None."""
        return self._stop.received

    # ---- save -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(target)
        except Exception as error:
            if not isinstance(error, OSError) and "(os error " not in str(error):  # as Rust's libraries call theirs
                raise
            shutil.rmtree(checkpoints.temporary_path(target), ignore_errors=True)
            free = shutil.disk_usage(target.parent).free / 2**30
            raise CheckpointError(
                f"{target} could not be written ({error}): {free:.2f} GiB are free there. Make room, or keep fewer "
                f"checkpoints (`save_total_limit`); `resume_from_checkpoint: true` goes on from the last one"
            ) from error

    def _write_checkpoint(self, target: Path) -> None:
        if self.accelerator.is_main_process:
            checkpoints.begin(target)
        self.accelerator.wait_for_everyone()
        folder = checkpoints.temporary_path(target)
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            prefix = self._state_prefix(folder)
            prefix.parent.mkdir(exist_ok=True)
            save_state(prefix, self._exact_state())
        is_main = self.accelerator.is_main_process
        weights = self._weight_hash(keep=is_main) if is_main or is_sharded(self.model) else ""
        if is_main:
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(target.parent / f"checkpoint-{self.state.best_global_step}")
            callbacks = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
            self.state.stateful_callbacks = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
            self.state.save_to_json(str(folder / _TRAINER_STATE))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            meta = {"step": self.state.global_step, "weights": weights, "run": self._fingerprint()}
            checkpoints.commit(folder, target, meta)
            best = self.state.best_model_checkpoint
            also = [target, *([Path(best)] if best else [])]
            checkpoints.prune(target.parent, self.args.save_total_limit, also=also)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers: the whole model (the adapter where there is one), whichever engine spread its weights.

        All processes must call it.
        """
        if engine_name(self.accelerator) is None:
            super().save_model(output_dir, _internal_call)
            return
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        wanted = trained.__contains__ if hasattr(self.model, "peft_config") else lambda name: True
        state = whole_state(self.model, wanted, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink()  # a pickle; config.yaml says it all

    def _exact_state(self) -> dict:
        """What a resume needs beside the weights; a trainer with more state adds its own."""
        return {
            "optimizer": optimizer_state(self.optimizer, engine_name(self.accelerator)),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "random": _random_states(),
        }

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in transformers, which calls it after every backward, on all ranks.

        Raises:
            UserError: If gradients are not finite: the weights would be lost, and the next checkpoint with them.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler leaves it out
            raise UserError(
                f"the gradient of step {self.state.global_step + 1} has norm {float(norm)}, nothing of it is saved: "
                f"lower `learning_rate`, or look at the rows of that step; "
                f"`resume_from_checkpoint: true` goes on from the last checkpoint"
            )
        return norm

    # ---- resume ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """As in transformers; `True` takes the newest complete checkpoint and names those it passes over.

        Raises:
            CheckpointError: No complete checkpoint, or one of a run that this recipe does not continue.
        """
        with watched_ranks(self.args):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs) -> Any:
        self._stop.received = None  # the signal of an earlier call; none is heard before training begins
        if self.accelerator.is_main_process:
            checkpoints.clean_leftovers(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._agreed_checkpoint(resume_from_checkpoint)
            if self._is_finished(resume_from_checkpoint):
                self._load_from_checkpoint(resume_from_checkpoint)
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                    self._load_best_model()
                return TrainOutput(self.state.global_step, 0.0, {})
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self._stop.restore()

    def _agreed_checkpoint(self, wanted: str | bool) -> str:
        """What the main process finds: another might look before leftovers are tidied up."""
        found = ["", ""]
        if self.accelerator.is_main_process:
            try:
                found[0] = str(self._checkpoint_to_resume(wanted))
                if not isinstance(wanted, bool):
                    self._leave_later_ones(found[0])
            except CheckpointError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1]:
            raise CheckpointError(found[1])
        return found[0]

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
        if reason := self._refusal(checkpoints.read_meta(found)["run"]):
            raise CheckpointError(f"{found} {reason}")
        return found

    def _leave_later_ones(self, checkpoint: str) -> None:
        """Checkpoints of later steps are of a course that this run leaves: `true` would go back to it."""
        if aside := checkpoints.set_aside_after(self.args.output_dir, checkpoints.read_meta(checkpoint)["step"]):
            logger.warning(
                f"the run goes on from {checkpoint}; checkpoints of later steps are kept in {self.args.output_dir} as "
                f"{', '.join(path.name for path in reversed(aside))}"
            )

    def _refusal(self, then: dict) -> str:
        """Why this run cannot go on from a checkpoint of a run of that fingerprint; empty where it can."""
        return refusal(then, self._fingerprint(), self.rows_on_any_ranks())

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether the run had taken all its steps; transformers would take one more."""
        planned = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        state = TrainerState.load_from_json(str(Path(checkpoint) / _TRAINER_STATE))
        if state.global_step >= planned:
            self.state = state
        return state.global_step >= planned

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """DeepSpeed's own checkpoints are pickles: ours take their place."""
        ours = resume_from_checkpoint is not None and self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if ours else resume_from_checkpoint)
        check_engine(self.accelerator, self.model_wrapped)
        if ours:
            self._load_from_checkpoint(str(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights and hold them against the hash that was taken when they were saved.

        transformers would load the files as they lie, whose keys are not those of the modules, and go on from the
        initial weights without an error.
        """
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        if hasattr(policy, "peft_config"):
            if engine_name(self.accelerator) is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_whole(policy, adapter_weights(policy, resume_from_checkpoint))
        else:
            dtype = reduce(torch.promote_types, {p.dtype for p in policy.parameters()})  # FSDP2 trains in float32
            with whole_models_made():
                saved = load_weights(AutoModelForImageTextToText, resume_from_checkpoint, dtype=dtype)
            load_whole(policy, saved.state_dict())
        wanted = checkpoints.read_meta(resume_from_checkpoint)["weights"]
        if self._weight_hash() != wanted:
            raise CheckpointError(f"the weights loaded from {resume_from_checkpoint} are not those that were saved")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, run = Path(checkpoint), checkpoints.read_meta(checkpoint)["run"]
        if not self._state_prefix(folder).parent.exists():
            raise CheckpointError(f"{checkpoint} holds weights only (`save_only_model`): it cannot be resumed")
        if run[RANKS] == self.accelerator.num_processes:
            self._restore(load_state(self._state_prefix(folder)))
            return
        if self.accelerator.is_main_process:
            logger.warning(
                f"{folder.name} was written by {ranks(run)}, this run has {self.accelerator.num_processes}: weights, "
                f"optimizer, schedule and rollouts in hand are those of the checkpoint; what is drawn from now on "
                f"(rollouts, dropout) has seeds of its own"
            )
        self._restore(
            self._shared_out([load_state(self._state_prefix(folder, rank)) for rank in range(run[RANKS])], run)
        )

    def _state_prefix(self, checkpoint: Path, rank: int | None = None) -> Path:
        """Where a process's state lies (this one's): below the model's folder, whose every safetensors file vLLM takes
        for weights."""
        return checkpoint / "state" / f"rank-{self.accelerator.process_index if rank is None else rank}"

    def _shared_out(self, states: list[dict], run: dict) -> dict:
        """This process's state, of those that the processes of `run` kept, which are not as many."""
        optimizers = [state["optimizer"] for state in states]
        return {**states[0], "optimizer": shared_optimizer_state(self.optimizer, optimizers), "random": None}

    def _restore(self, state: dict) -> None:
        """Put back what `_exact_state` kept; the random states wait for the data loader to be in its place."""
        load_optimizer_state(self.optimizer, state["optimizer"], engine_name(self.accelerator))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._random_states = state["random"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._random_states is None:
            place = [self.args.seed, self.state.global_step, self.accelerator.process_index]
            set_seed(int(numpy.random.SeedSequence(place).generate_state(1)[0]))
            return
        random.setstate(self._random_states["python"])
        numpy.random.set_state(self._random_states["numpy"])
        torch.set_rng_state(self._random_states["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random_states["cuda"])

    # ---- what must agree --------------------------------------------------------------------------------------------

    def _weight_hash(self, *, keep: bool = True) -> str:
        return combined_hash(whole_hashes(self.accelerator.unwrap_model(self.model), keep=keep))

    def part_hashes(self) -> dict[str, str]:
        """A hash of the weights of each part: a frozen one keeps its own through a run. All processes must call it."""
        return hashes_by_part(whole_hashes(self.accelerator.unwrap_model(self.model)))

    def _fingerprint(self) -> dict:
        """What a run must have in common with the one it continues."""
        settings = {key: plain(getattr(self.args, key)) for key in self.must_agree}
        processes = {RANKS: self.accelerator.num_processes, ENGINE: engine_name(self.accelerator)}
        return {**settings, **processes, "data": self.data_hash()}


def _random_states() -> dict:
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
