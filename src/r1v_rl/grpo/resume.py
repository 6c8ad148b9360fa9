"""What a GRPO checkpoint holds beside weights and optimizer: the sampler's position and the rollouts not used up."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from r1v_rl.grpo.ahead import RolloutsAhead, shared_ahead
from r1v_rl.grpo.batch import GenerationBatch
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.metrics import Metrics
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.sampler import MicroSteps, PromptSampler, chosen
from r1v_rl.grpo.tail import Tail, shared_tail
from r1v_rl.models.families import token_positions
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.tracking.completions import RolloutStore
from r1v_rl.training.other_ranks import ACCUMULATION, PER_DEVICE, PER_GENERATION, RANKS, Rows, ranks
from r1v_rl.training.resume import KEYS_OF_AN_UPDATE, ExactResume
from r1v_rl.types import Example

_MUST_AGREE = (
    *KEYS_OF_AN_UPDATE,
    # rollouts
    "num_generations", "steps_per_generation", "num_iterations", "max_completion_length", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "generation_kwargs", "use_vllm", "max_staleness", "dynamic_sampling",
    "over_provision", "partial_rollouts",
    # rewards
    "reward_weights", "multi_objective_aggregation", "scale_rewards", "answer_kind", "format_pattern",
    "cosine_max_len", "cosine_max_value_correct", "cosine_max_value_wrong", "cosine_min_value_correct",
    "cosine_min_value_wrong", "repetition_max_penalty", "repetition_n_grams", "soft_punish_cache", "max_completion_len",
    # loss
    "beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_bias_correction_kl", "epsilon",
    "epsilon_high", "delta", "importance_sampling_level", "sapo_temperature_neg", "sapo_temperature_pos",
    "entropy_coef", "top_entropy_quantile", "mask_truncated_completions", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "disable_dropout", "cast_lm_head_to_fp32", "share_prefix", "skip_zero_advantage",
)  # fmt: skip


class GRPOResume(ExactResume):
    """The checkpoints of `GRPOTrainer`: a run goes on inside a generation, with the rollouts it had."""

    must_agree = _MUST_AGREE

    args: GRPOConfig
    train_examples: Sequence[Example]
    sampler: PromptSampler
    metrics: Metrics
    reward_stage: RewardStage
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
        advantages = state["fields"]["advantages"].to(self.accelerator.device)
        self._buffer = GenerationBatch(prompts=prompts, **{**state["fields"], "advantages": advantages})
        self._buffered_generation = state["generation"]

    def _restore_ahead(self, ahead: RolloutsAhead, state: dict[int, dict]) -> None:
        """What every process has; the rest is asked for again, by all of them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for number in sorted(set.intersection(*map(set, gather_object([list(state)])))):
            rows = self.sampler.prompts(number, rank, world)
            ahead.restore(number, self._encode([self.train_examples[i] for i in rows]), state[number])

    # ---- on another number of ranks -------------------------------------------------------------------------------

    def rows_on_any_ranks(self) -> Rows:
        rows: dict[str, tuple[str, ...]] = {"the rows of a generation": (PER_DEVICE, PER_GENERATION, RANKS)}
        if self.args.loss_type == "bnpo" or self.args.entropy_coef:
            rows["the rows of a micro-batch (`loss_type: bnpo` and `entropy_coef` weigh tokens by it)"] = (PER_DEVICE,)
        if self.args.top_entropy_quantile < 1.0:
            rows["the rows of a micro-step (`top_entropy_quantile` is over their tokens)"] = (PER_DEVICE, RANKS)
        return {**super().rows_on_any_ranks(), **rows}

    def _refusal(self, then: dict) -> str:
        now = self._fingerprint()
        if (reason := super()._refusal(then)) or then[RANKS] == now[RANKS]:
            return reason
        for run in (then, now):
            between_updates = math.gcd(run[PER_GENERATION], run[ACCUMULATION])
            if between_updates < run[PER_GENERATION] and run[PER_DEVICE] * between_updates % run["num_generations"]:
                return (
                    f"was written by {ranks(then)}, and on {ranks(run)} an update takes parts of groups "
                    f"({run[PER_DEVICE]} x {between_updates} rows of groups of {run['num_generations']}): other ranks "
                    f"would make other updates of a generation. Launch with `--num_processes {then[RANKS]}`"
                )
        return ""

    def _shared_out(self, states: list[dict], run: dict) -> dict:
        """Whole groups change hands; the position is counted in micro-steps of this run."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        places, mine = [self.sampler.places(r, run[RANKS]) for r in range(run[RANKS])], self.sampler.places(rank, world)
        rows = states[0]["micro_step"] * run[PER_DEVICE] * run[RANKS]
        return {
            **super()._shared_out(states, run),
            "micro_step": rows // (self.args.per_device_train_batch_size * world),
            "buffer": _shared_buffer([state["buffer"] for state in states], places, mine, world),
            "ahead": shared_ahead([state["ahead"] for state in states], places, mine),
            "tail": shared_tail([state["tail"] for state in states], rank, world) if self._tail is not None else None,
        }

    # ---- what the run is made of ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Micro-steps: what each of them trains on follows from its number alone."""
        return DataLoader(MicroSteps(self.sampler), batch_size=1, collate_fn=lambda items: items[0])

    def _fingerprint(self) -> dict:
        return {**super()._fingerprint(), "reward_funcs": [function.name for function in self.reward_stage.functions]}

    def data_hash(self) -> str:
        """A hash of the training rows' ids, prompts and answers."""
        rows = [[e.id, e.answer, e.messages] for e in self.train_examples]
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _shared_buffer(states: list[dict], places: list[list[int]], mine: list[int], world: int) -> dict | None:
    """Of the buffers of several processes, with the prompts at `places`, that of one of `world` with those at `mine`;
    None where the generation is used up."""
    if states[0] is None:
        return None
    parts = [state["fields"] for state in states]
    size = len(parts[0]["completion_ids"]) // len(parts[0]["rows"])
    fields: dict[str, Any] = {
        "rows": chosen([part["rows"] for part in parts], places, mine),
        "advantages": torch.stack(chosen([list(part["advantages"]) for part in parts], places, mine, size)),
        "process_tokens": parts[0]["process_tokens"] * len(parts) / world,
        "weight_version": min(part["weight_version"] for part in parts),
    }
    for name in ("completion_ids", "counts", "sampler_logprobs", "old_logprobs", "reference_logprobs"):
        found = [part[name] for part in parts]
        fields[name] = None if any(values is None for values in found) else chosen(found, places, mine, size)
    return {"generation": states[0]["generation"], "fields": fields}
