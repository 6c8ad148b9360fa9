"""Rollouts by transformers' `generate`: slow, and the reference that the fast engine is held against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from r1v_rl.models.families import joined, token_types
from r1v_rl.models.parts import PARTS
from r1v_rl.rollout.engine import OnGroup, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.rollout.weights import merged_weights, trained_parts
from r1v_rl.types import Completion


class TransformersEngine:
    """Samples from the policy object itself: there is nothing to sync.

    Args:
        policy: The policy, or with `twin` a whole model of its class, that is given the policy's weights at every
            sync: where the policy's own are spread over processes.
    """

    def __init__(
        self, policy: Any, tokenizer: Any, *, eos_token_ids: list[int], banned_token_ids: list[int], twin: bool = False
    ):
        self._policy = policy
        self._is_twin, self._synced = twin, False
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._banned = banned_token_ids
        self._version: int | None = None

    def sync_weights(self, policy: Any, version: int = 0) -> None:
        self._version = version
        if not self._is_twin:
            self._policy = policy
            return
        own = self._policy.state_dict()
        for block in merged_weights(policy, trained_parts(policy) if self._synced else PARTS):
            for name, tensor in block.items():
                own[name].copy_(tensor)
        self._synced = True

    def generate(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """Completions without log-probabilities: they are the policy's own, which the trainer computes anyway. All of
        them are there at the end, and no group before."""
        count = sampling.num_generations
        rows = [prompt for prompt in prompts for _ in range(count)]
        limits = [limit for limit in sampling.limits(len(prompts)) for _ in range(count)]
        completions = self._sample(rows, sampling, limits, seed)
        groups = [completions[i : i + count] for i in range(0, len(completions), count)]
        if on_group is not None:
            for number, group in enumerate(groups):
                on_group(number, group)
        return groups

    def stream(
        self, prompt: EncodedPrompt, sampling: Sampling, *, seed: int, on_text: Callable[[str], None]
    ) -> Completion:
        """One completion; `on_text` receives its text word by word."""
        streamer = _Streamer(self._tokenizer, on_text)
        return self._sample([prompt], sampling, sampling.limits(1), seed, streamer)[0]

    @torch.no_grad()
    def token_logprobs(self, prompts: list[EncodedPrompt], texts: list[list[int]]) -> list[list[float]]:
        """One forward a row: nothing is padded, so nothing depends on a model's idea of padding."""
        found = []
        device = next(self._policy.parameters()).device
        was_training = self._policy.training
        self._policy.eval()
        for prompt, ids in zip(prompts, texts, strict=True):
            inputs = torch.tensor([prompt.prompt_ids + ids], device=device)
            vision = {name: tensor.to(device) for name, tensor in prompt.vision_inputs.items()}
            vision |= token_types(self._policy, inputs)
            logits = self._policy(input_ids=inputs, **vision, logits_to_keep=len(ids) + 1).logits
            logprobs = torch.log_softmax(logits[0, :-1].float(), dim=-1)
            found.append(logprobs.gather(1, inputs[0, -len(ids) :, None])[:, 0].tolist())
        self._policy.train(was_training)
        return found

    @torch.no_grad()
    def _sample(
        self,
        rows: list[EncodedPrompt],
        sampling: Sampling,
        limits: list[tuple[int, float]],
        seed: int,
        streamer: TextStreamer | None = None,
    ) -> list[Completion]:
        device = next(self._policy.parameters()).device
        inputs = self._tokenizer.pad(
            {"input_ids": [row.prompt_ids for row in rows]}, padding_side="left", return_tensors="pt"
        ).to(device)
        pictures = joined([row.vision_inputs for row in rows])
        vision = {name: tensor.to(device) for name, tensor in pictures.items()}
        vision |= token_types(self._policy, inputs["input_ids"])
        was_training = self._policy.training
        self._policy.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            arguments = self._arguments(sampling, limits, inputs)
            with _without_defaults(self._policy):
                output = self._policy.generate(**inputs, **vision, **arguments, streamer=streamer, synced_gpus=False)
        self._policy.train(was_training)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._completion(ids[:most]) for ids, (most, _) in zip(new_tokens, limits, strict=True)]

    def _arguments(self, sampling: Sampling, limits: list[tuple[int, float]], inputs: Any) -> dict:
        choice = (
            {"do_sample": False}
            if sampling.temperature == 0.0
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
            }
        )
        most, penalties = [tokens for tokens, _ in limits], [penalty for _, penalty in limits]
        processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
        if any(penalty != 1.0 for penalty in penalties):
            processors.append(_RepetitionPenalties(penalties, inputs["attention_mask"]))
        if len(set(most)) > 1:
            criteria.append(_TokenLimits(most, inputs["input_ids"].shape[1]))
        return {
            "max_new_tokens": max(most),
            "logits_processor": processors,
            "stopping_criteria": criteria,
            "eos_token_id": self._eos,
            "pad_token_id": self._tokenizer.pad_token_id,
            "suppress_tokens": self._banned or None,
            **choice,
            **sampling.extra,
        }

    def _completion(self, token_ids: list[int]) -> Completion:
        end = next((i + 1 for i, token in enumerate(token_ids) if token in self._eos), None)
        kept = token_ids if end is None else token_ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(
            token_ids=kept, logprobs=[], text=text, is_truncated=end is None, weight_version=self._version
        )


@contextmanager
def _without_defaults(policy: Any) -> Iterator[None]:
    """The recipe alone decides: `generate` would add what the model's generation_config.json says, such as a penalty,
    which vLLM does not."""
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Streamer(TextStreamer):
    """transformers' own streamer, whose text goes to a function instead of to the console."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


class _RepetitionPenalties(LogitsProcessor):
    """Each row's own penalty over its prompt and what it has written, as vLLM has it; transformers' own takes one
    for all rows, and counts the padding before a short prompt as written."""

    def __init__(self, penalties: list[float], prompt_mask: Tensor):
        self._penalties = torch.tensor(penalties, device=prompt_mask.device)[:, None]
        self._mask = prompt_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: `input_ids` (B, T) so far, `scores` (B, V) of the next token."""
        real = torch.ones_like(input_ids, dtype=torch.bool)
        real[:, : self._mask.shape[1]] = self._mask
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_reduce(1, input_ids, real, "amax")
        penalised = torch.where(scores > 0, scores / self._penalties, scores * self._penalties)
        return torch.where(seen, penalised, scores)


class _TokenLimits(StoppingCriteria):
    """Ends each row after as many new tokens as it may have."""

    def __init__(self, limits: list[int], start: int):
        self._limits, self._start = torch.tensor(limits), start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,): whether each row is done."""
        return (input_ids.shape[1] - self._start >= self._limits).to(input_ids.device)
