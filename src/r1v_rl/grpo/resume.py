"""What a GRPO checkpoint holds beside weights and optimizer: the sampler's position and the rollouts not used up."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from r1v_rl.grpo.ahead import RolloutsAhead
from r1v_rl.grpo.batch import GenerationBatch
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.metrics import Metrics
from r1v_rl.grpo.sampler import MicroSteps, PromptSampler
from r1v_rl.grpo.tail import Tail
from r1v_rl.models.families import token_positions
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.tracking.completions import RolloutStore
from r1v_rl.training.resume import ExactResume
from r1v_rl.types import Example

_MUST_AGREE = (
    "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_iterations", "max_completion_length", "temperature", "loss_type", "beta", "seed", "data_seed",
    "shuffle_dataset", "trainable", "learning_rate", "optim", "use_vllm",
    "share_prefix", "skip_zero_advantage", "max_staleness", "dynamic_sampling",
    "over_provision", "partial_rollouts",
)  # fmt: skip


class GRPOResume(ExactResume):
    """The checkpoints of `GRPOTrainer`: a run goes on inside a generation, with the rollouts it had."""

    must_agree = _MUST_AGREE

    args: GRPOConfig
    train_examples: Sequence[Example]
    sampler: PromptSampler
    metrics: Metrics
    ref_model: Any
    rollout_store: RolloutStore | None
    _ahead: RolloutsAhead | None
    _tail: Tail | None
    _buffer: GenerationBatch | None
    _buffered_generation: int
    _micro_step: int

    def _encode(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
        """The examples' prompts, images decoded and processed once."""
        device, kwargs = self.accelerator.device, self.args.chat_template_kwargs
        prompts = [encode_prompt(self.processing_class, e, device=device, template_kwargs=kwargs) for e in examples]
        for prompt in prompts:
            own = token_positions(self.model, [prompt.prompt_ids], prompt.vision_inputs.get("image_grid_thw"))
            prompt.positions = own[0] if own else None
        return prompts

    def _exact_state(self) -> dict:
        return {
            **super()._exact_state(),
            "micro_step": self._micro_step,
            "num_tokens": self.metrics.num_tokens,
            "buffer": self._buffer_state(),
            "ahead": self._ahead.state() if self._ahead is not None else {},
            "tail": self._tail.state() if self._tail is not None else None,
            "reference": dict(self.ref_model.state_dict()) if self.args.sync_ref_model else None,
        }

    def _buffer_state(self) -> dict | None:
        """The rollouts that are not used up; their prompts follow from the training data."""
        used_up = self._micro_step % self.sampler.micro_steps_per_generation == 0
        if self._buffer is None or used_up:
            return None
        names = [name for name in GenerationBatch.__slots__ if name != "prompts"]
        return {
            "generation": self._buffered_generation,
            "fields": {name: getattr(self._buffer, name) for name in names},
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        if not resume_from_checkpoint and self.rollout_store is not None:
            self.rollout_store.forget_after(-1)
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.close()

    def _restore(self, state: dict) -> None:
        super()._restore(state)
        self._micro_step = state["micro_step"]
        self.metrics.num_tokens = state["num_tokens"]
        if self.rollout_store is not None:
            self.rollout_store.forget_after((self._micro_step - 1) // self.sampler.micro_steps_per_generation)
        if state["reference"] is not None:
            self.ref_model.load_state_dict(state["reference"])
        if state["buffer"] is not None:
            self._restore_buffer(state["buffer"])
        if self._ahead is not None:
            self._restore_ahead(self._ahead, state["ahead"])
        if self._tail is not None:
            self._tail.restore(state["tail"], lambda rows: self._encode([self.train_examples[i] for i in rows]))

    def _restore_buffer(self, state: dict) -> None:
        prompts = self._encode([self.train_examples[i] for i in state["fields"]["rows"]])
        self._buffer = GenerationBatch(prompts=prompts, **state["fields"])
        self._buffered_generation = state["generation"]

    def _restore_ahead(self, ahead: RolloutsAhead, state: dict[int, dict]) -> None:
        """What every process has; the rest is asked for again, by all of them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for number in sorted(set.intersection(*map(set, gather_object([list(state)])))):
            rows = self.sampler.prompts(number, rank, world)
            ahead.restore(number, self._encode([self.train_examples[i] for i in rows]), state[number])

    def get_train_dataloader(self) -> DataLoader:
        """Micro-steps: what each of them trains on follows from its number alone."""
        return DataLoader(MicroSteps(self.sampler), batch_size=1, collate_fn=lambda items: items[0])

    def data_hash(self) -> str:
        """A hash of the training rows' ids, prompts and answers."""
        rows = [[e.id, e.answer, e.messages] for e in self.train_examples]
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
