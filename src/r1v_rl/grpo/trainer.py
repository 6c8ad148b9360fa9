"""The GRPO trainer: roll out whole groups, reward them, centre, update. `_rollout` and `compute_loss` are the loop."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from trl.trainer.callbacks import SyncRefModelCallback

from r1v_rl.data.chat import prompt_text
from r1v_rl.data.dataset import as_examples
from r1v_rl.grpo.ahead import RolloutsAhead
from r1v_rl.grpo.batch import GenerationBatch, ModelInputs, loss_mask, model_inputs, padded, score
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.evaluation import GroundingEvery, HeldoutEvaluation
from r1v_rl.grpo.loss import LossInputs, LossStats, Normalisation, policy_loss
from r1v_rl.grpo.metrics import Metrics, entropy_mask
from r1v_rl.grpo.policy import (
    frozen_vision,
    prepare_models,
    prepare_reference,
    reference_policy,
    shares_prefix,
)
from r1v_rl.grpo.records import completion_records, show_completions
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.grpo.rollouts import Rollouts
from r1v_rl.grpo.sampler import prompt_sampler
from r1v_rl.grpo.update import (
    idle_passes,
    not_the_last_pass,
    rows_to_run,
    shortest,
    spread,
    within_budget,
    zero_with_gradient,
)
from r1v_rl.models.blank_picture import BlankPicture
from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.tracking.callbacks import drop_default_console, tracking_callbacks
from r1v_rl.tracking.completions import RolloutStore
from r1v_rl.training.engines import check_devices, prepare_engine, shards_weights
from r1v_rl.training.optimizer import parameter_groups
from r1v_rl.training.signals import StopOnSignal


class GRPOTrainer(HeldoutEvaluation):
    """Multimodal GRPO on `transformers.Trainer`, with TRL's constructor and TRL's metric names.

    Args:
        model: A vision-language (or text) model, or the folder or hub id of one.
        reward_funcs: Registry names, dotted paths, `file.py:function`, or functions with TRL's signature.
        args: The recipe.
        train_dataset: `datasets.Dataset` (columns as in the README), a list of rows, or a list of `Example`.
        eval_dataset: Likewise; answered greedily, reported as `eval_accuracy`. Of a dict of them `heldout` is that one,
            and the others are the sets that are answered every `eval_steps`.
        processing_class: The processor; that of `model` where unset.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        peft_config: Train a LoRA adapter of this configuration instead of whole parts.
        engine: Another rollout engine than the recipe's.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: list,
        args: GRPOConfig,
        train_dataset: Dataset | list,
        eval_dataset: Dataset | list | dict | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        engine: RolloutEngine | None = None,
    ):
        check_devices(args)
        policy, self.ref_model, processor = prepare_models(model, processing_class, args, peft_config)
        self.share_prefix = shares_prefix(args, policy, self.ref_model)
        self._stop = StopOnSignal()
        self.train_examples = as_examples(train_dataset)
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"heldout": eval_dataset}
        self.eval_sets = {name: as_examples(rows) for name, rows in sets.items() if rows is not None}
        self.eval_examples = self.eval_sets.pop("heldout", None)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=self.train_examples,
            eval_dataset=self.eval_examples or next(iter(self.eval_sets.values()), None),
            processing_class=processor,
            callbacks=[*tracking_callbacks(args), self._stop, *(callbacks or [])],
            optimizers=optimizers,
            compute_loss_func=policy_loss,  # tells transformers that the loss does its own scaling
        )
        drop_default_console(self)
        prepare_engine(self)
        self._vision = frozen_vision(self.model, args, self.accelerator)
        needs_blank = BlankPicture.is_needed(self.model, shards=shards_weights(self.accelerator))
        self._blank = BlankPicture(processor, self.accelerator.device, self._vision) if needs_blank else None
        self.sampler = prompt_sampler(len(self.train_examples), args)
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.ref_model, self.accelerator, args)
        if args.grounding_every:
            self.add_callback(GroundingEvery(self, args.grounding_every))
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        first_prompt = prompt_text(processor, self.train_examples[0], args.chat_template_kwargs)
        self.reward_stage = RewardStage(reward_funcs, args, prompt_opens_think=prompt_opens_think(first_prompt))
        self.metrics = Metrics(self.accelerator)
        rank = self.accelerator.process_index
        self.rollout_store = RolloutStore(args.output_dir, rank=rank) if args.save_rollouts else None
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._engine, self._engine_version = engine, None
        self._ahead = RolloutsAhead(args.max_staleness) if args.max_staleness else None
        self._tail = self._make_tail() if args.over_provision else None
        self._buffer: GenerationBatch | None = None
        self._buffered_generation = -1
        self._micro_step, self._step_seconds = 0, 0.0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: rollout if its turn has come, forward, backward."""
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_step += 1
        self._step_seconds += time.perf_counter() - started
        if self.accelerator.sync_gradients:
            self.metrics.add("step_time", self._step_seconds)
            self._step_seconds = 0.0
        return loss

    def _prepare_inputs(self, inputs: dict) -> dict:
        """The rows of this micro-step, from the buffered generation batch or a fresh one."""
        generation, position = divmod(self._micro_step, self.sampler.micro_steps_per_generation)
        if self._buffer is None or self._buffered_generation != generation:
            self._buffer = None  # free the old images before the new ones are read
            self._buffer = self._rollout(generation)
            self._buffered_generation = generation
        start = position % self.args.steps_per_generation * self.args.per_device_train_batch_size
        return {"start": start, "end": start + self.args.per_device_train_batch_size}

    def _rollout(self, generation: int) -> GenerationBatch:
        """Sample, reward and centre the groups of one generation; what the update needs of them."""
        rollouts = self._sampled(generation)
        if rollouts.early is not None:
            self.metrics.add("rollout/seconds_reward_early", rollouts.early.seconds)
        with self.metrics.timed("reward"):
            rewarded = self.reward_stage(rollouts.groups, self.accelerator, self.state, rollouts.early)
        if self.args.dynamic_sampling:
            with self.metrics.timed("resample"):
                self._replace_equal_groups(generation, rollouts, rewarded)
        batch = self._generation_batch(rollouts, rewarded.advantages)
        with self.metrics.timed("score"):
            self._score_old_and_reference(batch)
        self.metrics.add_rollout(rollouts.groups, rewarded)
        if self._ahead is not None or self.args.partial_rollouts:
            self.metrics.add_staleness(rollouts.groups, self.state.global_step)
        records = completion_records(rollouts.prompts, rollouts.groups, rewarded)
        if self.rollout_store is not None:
            self.rollout_store.write(generation, records)
        if self.args.log_completions and self.accelerator.is_main_process:
            limit = self.args.num_completions_to_print or 4
            show_completions(self.callback_handler.callbacks, self.state.global_step, records, limit)
        return batch

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The policy loss of rows `start:end` of the buffered generation batch, in passes within the token budget: all
        but the last have run backward already."""
        batch, rows = self._buffer, range(inputs["start"], inputs["end"])
        assert batch is not None
        rest = self._loss_inputs(batch, rows)
        distributed = self.accelerator.distributed_type != DistributedType.NO
        run = rows_to_run(batch, rows, self.args, at_least_one=distributed)
        self.metrics.add("skipped_completions", 1 - len(run) / len(rows))
        passes = within_budget(batch, run, self.args.max_tokens_per_forward, share_prefix=self.share_prefix)
        if not passes:
            return self._policy_loss(batch, rest)[0] + zero_with_gradient(model)
        for _ in range(idle_passes(len(passes), self.accelerator)):
            with not_the_last_pass(self.accelerator, model):
                self._backward(score(model, self._model_inputs(batch, [shortest(batch, rows)]))[0].sum() * 0.0)
        whole = replace(rest, logprobs=rest.logprobs.clone(), entropies=rest.entropies.clone())
        ran = torch.zeros(len(rows), dtype=torch.bool, device=rest.mask.device)
        for i, part_rows in enumerate(passes, start=1):
            places = torch.tensor(part_rows, device=ran.device) - rows.start
            with not_the_last_pass(self.accelerator, model) if i < len(passes) else nullcontext():
                logprobs, entropies = score(model, self._model_inputs(batch, part_rows))
                part = replace(
                    rest,
                    logprobs=spread(logprobs, places, rest.logprobs),
                    entropies=spread(entropies, places, rest.entropies),
                )
                loss, stats = self._policy_loss(batch, part)
                if i < len(passes):
                    self._backward(loss)
            whole.logprobs[places] = part.logprobs.detach()[places]
            whole.entropies[places] = part.entropies.detach()[places]
            ran[places] = True
        if len(passes) > 1:  # a pass has its own gradient, but not its own share of the loss
            value, stats = self._policy_loss(batch, whole)
            loss = loss + (value - loss).detach()
        seen = replace(whole, mask=whole.mask & ran[:, None])
        self.metrics.add_update(seen, stats, sampler_logprobs=padded(batch.sampler_logprobs, rows, seen.mask))
        return loss

    def _backward(self, loss: Tensor) -> None:
        """As transformers does it for the last pass: the loss has its scale already."""
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))

    def _loss_inputs(self, batch: GenerationBatch, rows: range) -> LossInputs:
        """What is known of these rows before the policy runs; log-probabilities that give ratios near 1 stand for its
        own."""
        mask = loss_mask(batch, rows).to(self.accelerator.device)
        old, correctable = padded(batch.old_logprobs, rows, mask), padded(self._correctable(batch), rows, mask)
        nothing = torch.zeros(mask.shape, device=mask.device)
        rest = old if old is not None else correctable
        return LossInputs(
            logprobs=nothing if rest is None else rest,
            entropies=nothing,
            advantages=batch.advantages[rows.start : rows.stop],
            mask=mask,
            old_logprobs=old,
            reference_logprobs=padded(batch.reference_logprobs, rows, mask),
            sampler_logprobs=correctable,
        )

    def _policy_loss(self, batch: GenerationBatch, inputs: LossInputs) -> tuple[Tensor, LossStats]:
        steps = self.current_gradient_accumulation_steps
        share = steps / self.args.steps_per_generation
        tokens = torch.tensor(batch.process_tokens * share, device=inputs.mask.device)
        kept = entropy_mask(inputs.entropies.detach(), inputs.mask, self.args.top_entropy_quantile, self.accelerator)
        return policy_loss(inputs, self.args, Normalisation(steps, tokens), kept)

    # ---- parts of the loop ----------------------------------------------------------------------------------------

    def _generation_batch(self, rollouts: Rollouts, advantages: Tensor) -> GenerationBatch:
        completions = [c for group in rollouts.groups for c in group.completions]
        counts = [not (self.args.mask_truncated_completions and c.is_truncated) for c in completions]
        tokens = sum(len(c.token_ids) for c, counted in zip(completions, counts, strict=True) if counted)
        device = self.accelerator.device
        total = self.accelerator.reduce(torch.tensor(float(tokens), device=device), reduction="sum").item()
        return GenerationBatch(
            prompts=rollouts.prompts,
            rows=rollouts.rows,
            completion_ids=[c.token_ids for c in completions],
            counts=counts,
            advantages=advantages.flatten().to(device),
            process_tokens=max(total, 1.0) / self.accelerator.num_processes,
            weight_version=min(group.weight_version for group in rollouts.groups),
            sampler_logprobs=[torch.tensor(c.logprobs, device=device) for c in completions]
            if all(len(c.logprobs) == len(c.token_ids) for c in completions)
            else None,
        )

    def _model_inputs(self, batch: GenerationBatch, rows: Sequence[int]) -> ModelInputs:
        """These rows for the policy, their pictures seen by a frozen tower already (once, at their first use)."""
        prompts = {row // batch.num_generations: None for row in rows}
        for prompt in (batch.prompts[p] for p in prompts):
            pixels = prompt.vision_inputs.get("pixel_values")
            if self._vision is not None and pixels is not None and pixels.ndim == 4:
                with self.accelerator.autocast():
                    prompt.vision_inputs["pixel_values"] = self._vision.of(pixels, prompt.images)
        inputs = model_inputs(
            batch,
            rows,
            pad_token_id=self._tokenizer.pad_token_id,
            device=self.accelerator.device,
            share_prefix=self.share_prefix,
        )
        if self._blank is not None:
            with self.accelerator.autocast():
                self._blank.add_to(inputs.kwargs, inputs.scored)
        return inputs

    @torch.no_grad()
    def _score_old_and_reference(self, batch: GenerationBatch) -> None:
        """Log-probabilities of the sampling policy and of the reference, where the loss cannot do without them."""
        several_updates = self.args.gradient_accumulation_steps % self.sampler.micro_steps_per_generation != 0
        if several_updates:  # else the old policy is the present one
            batch.old_logprobs = self._score_all(self.model_wrapped, batch)
        if self.args.beta != 0.0:
            policy = self.accelerator.unwrap_model(self.model)
            with reference_policy(self.ref_model, policy, self.model_wrapped) as reference:
                batch.reference_logprobs = self._score_all(reference, batch)

    def _score_all(self, model: nn.Module, batch: GenerationBatch) -> list[Tensor]:
        size, rows = self.args.per_device_train_batch_size, range(len(batch.completion_ids))
        found: list[Tensor] = []
        for start in rows[::size]:
            micro_batch, budget = rows[start : start + size], self.args.max_tokens_per_forward
            passes = within_budget(batch, micro_batch, budget, share_prefix=self.share_prefix)
            for _ in range(idle_passes(len(passes), self.accelerator)):
                score(model, self._model_inputs(batch, [shortest(batch, micro_batch)]))
            for part in passes:
                inputs = self._model_inputs(batch, part)
                logprobs, _ = score(model, inputs)
                found += [row[mask] for row, mask in zip(logprobs, inputs.token_mask, strict=True)]
        return found

    # ---- what transformers.Trainer asks for -------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args, decayed=set(self.get_decay_parameter_names(model)))
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.metrics.flush()}, start_time)

    def floating_point_ops(self, inputs: dict) -> int:
        return 0  # transformers' estimate knows nothing of groups

    def _correctable(self, batch: GenerationBatch) -> list[Tensor] | None:
        return batch.sampler_logprobs if self.args.vllm_importance_sampling_correction else None
