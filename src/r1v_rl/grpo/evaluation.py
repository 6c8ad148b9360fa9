"""What a GRPO run measures beside its rewards: held-out accuracy, whether the picture matters, doubt at reflections.

Everything is asked of the engine that rolls out, greedily; nothing draws from the random streams of training.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1v_rl.evaluate.accuracy import Accuracy, Answered, accuracy, answer_greedily, blanked
from r1v_rl.evaluate.grounding import control_rows, gold_logprobs, grounding_measures
from r1v_rl.evaluate.reflections import opening_tokens
from r1v_rl.grpo.batch import GenerationBatch, ModelInputs, score
from r1v_rl.grpo.rollouts import GroupRollouts
from r1v_rl.types import Example

_CHUNK = 256
"""Rows whose pictures are in memory at once."""
_NO_EXAMPLE = Example(id="", messages=[], images=(), answer=None)  # other processes know the rows


class HeldoutEvaluation(GroupRollouts):
    """The part of `GRPOTrainer` that measures."""

    control: TrainerControl

    def _model_inputs(self, batch: GenerationBatch, rows: Sequence[int]) -> ModelInputs:
        raise NotImplementedError

    # ---- accuracy ---------------------------------------------------------------------------------------------------

    def heldout_answers(self, examples: Sequence[Example] | None = None, *, blank: bool = False) -> list[Answered]:
        """These rows (by default the held-out ones) answered greedily with the present weights; `blank` empties their
        pictures. Every process answers its share, and has all answers."""
        self._sync_engine()
        answered: list[Answered] = []
        examples = [blanked(e) if blank else e for e in ((self.eval_examples or []) if examples is None else examples)]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for start in range(rank, len(examples), _CHUNK * world):
            rows = examples[start : start + _CHUNK * world : world]
            answered += answer_greedily(
                self.engine,
                self._encode(rows),
                max_tokens=self.args.max_completion_length or 0,
                answer_kind=self.args.answer_kind,
                timeout_s=self.args.reward_timeout_s,
            )
        if world == 1:
            return answered
        shares = gather_object([[replace(row, example=_NO_EXAMPLE) for row in answered]])
        return [replace(shares[i % world][i // world], example=example) for i, example in enumerate(examples)]

    def heldout_accuracy(self, *, blank: bool = False) -> Accuracy:
        """Accuracy on the held-out rows with its 95 % interval."""
        return accuracy(self.heldout_answers(blank=blank))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """`eval_accuracy` with its interval, `eval_mean_length` and `eval_critical_token_entropy`, logged; called every
        `eval_steps`. With `eval_on` of each of its sets too, as `eval_NAME_accuracy`, the first being their mean."""
        answers = {name: self.heldout_answers(rows) for name, rows in self.eval_sets.items()}
        everything = [row for rows in answers.values() for row in rows] if answers else self.heldout_answers()
        metrics: dict[str, float] = {}
        for name, rows in answers.items():
            metrics |= _named(f"{metric_key_prefix}_{name}_", accuracy(rows))
        if len(answers) > 1:
            shares = [metrics[f"{metric_key_prefix}_{name}_accuracy"] for name in answers]
            metrics[f"{metric_key_prefix}_accuracy"] = sum(shares) / len(shares)
        else:
            metrics |= _named(f"{metric_key_prefix}_", accuracy(everything))
        lengths = [len(row.completion.token_ids) for row in everything]
        metrics[f"{metric_key_prefix}_mean_length"] = sum(lengths) / len(lengths)
        metrics |= {f"{metric_key_prefix}_{key}": value for key, value in self._reflections(everything).items()}
        Trainer.log(self, metrics)  # not our own, which would close the means of the training steps
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict, trial: Any) -> bool:
        """A new best model is kept, whatever `save_steps` says: else it could not be loaded at the end."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._engine_version = None  # other weights, and no step was taken

    # ---- reflections ------------------------------------------------------------------------------------------------

    def _reflections(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Openings of reflections per answer, and the mean entropy where they open; that one only where there are any.

        The entropy is the policy's, at the rollouts' temperature.
        """
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        openings = [opening_tokens(row.completion.token_ids, tokenizer, self.args.critical_tokens) for row in answered]
        reflecting = [(row, places) for row, places in zip(answered, openings, strict=True) if places]
        found = {"reflections": sum(map(len, openings)) / max(1, len(answered))}
        entropies: list[Tensor] = []
        size = self.args.per_device_train_batch_size
        for start in range(0, len(reflecting), size):
            part = reflecting[start : start + size]
            rows = self._entropies([row for row, _ in part])
            entropies += [row[places] for row, (_, places) in zip(rows, part, strict=True)]
        if entropies:
            found["critical_token_entropy"] = torch.cat(entropies).mean().item()
        return found

    @torch.no_grad()
    def _entropies(self, answered: Sequence[Answered]) -> Tensor:
        """(B, T): the entropy of the policy before each token of these answers."""
        model, rows = self.model_wrapped, range(len(answered))
        batch = GenerationBatch(
            prompts=self._encode([row.example for row in answered]),
            completion_ids=[row.completion.token_ids for row in answered],
            counts=[True for _ in answered],
            advantages=torch.zeros(len(answered)),
            process_tokens=1.0,
            weight_version=self.state.global_step,
        )
        was_training = model.training
        model.eval()  # dropout would draw from the stream of training
        entropies = score(model, self._model_inputs(batch, rows))[1]
        model.train(was_training)
        return entropies

    # ---- grounding --------------------------------------------------------------------------------------------------

    def grounding(self) -> dict[str, Any]:
        """`grounding_measures` of the first `grounding_size` rows with pictures."""
        known = [*(self.eval_examples or []), *(row for rows in self.eval_sets.values() for row in rows)]
        rows = [example for example in known if example.images][: self.args.grounding_size]
        right: dict[str, dict[str, list[bool]]] = {}
        logprobs: dict[str, dict[str, float]] = {}
        for name, asked in control_rows(rows, self.args.grounding_controls, self.args.seed).items():
            right[name] = {row.example.id: [row.verdict.correct is True] for row in self.heldout_answers(asked)}
            logprobs[name] = {}
            for start in range(0, len(asked), _CHUNK):
                prompts = self._encode(asked[start : start + _CHUNK])
                logprobs[name] |= gold_logprobs(self.engine, prompts, self.processing_class)
        return grounding_measures(right, logprobs, self.args.seed)

    def log_grounding(self) -> None:
        """`grounding/CONTROL/accuracy_gap` and `/logprob_gap` with their intervals; `grounding/gap` is the first
        control's gap in accuracy."""
        metrics: dict[str, float] = {}
        for name, control in self.grounding()["controls"].items():
            for gap in ("accuracy_gap", "logprob_gap"):
                for bound, value in control[gap].items():
                    metrics[f"grounding/{name}/{gap}" + ("" if bound == "value" else f"_{bound}")] = value
            if "grounding/gap" not in metrics:
                metrics |= {"grounding/gap": control["accuracy_gap"]["value"]}
                metrics |= {f"grounding/gap_{bound}": control["accuracy_gap"][bound] for bound in ("low", "high")}
        Trainer.log(self, metrics)


class GroundingEvery(TrainerCallback):
    """Measures before the first step and every `grounding_every` steps."""

    def __init__(self, trainer: HeldoutEvaluation, every: int):
        self._trainer, self._every = trainer, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._trainer.log_grounding()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._trainer.log_grounding()


def _named(prefix: str, share: Accuracy) -> dict[str, float]:
    values = asdict(share)
    return {f"{prefix}accuracy": values["value"], f"{prefix}low": values["low"], f"{prefix}high": values["high"]}
