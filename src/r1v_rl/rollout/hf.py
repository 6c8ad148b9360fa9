"""Rollouts by transformers' `generate`: slow, and the reference that the fast engine is held against."""

from typing import Any

import torch

from r1v_rl.models.families import joined, token_types
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion


class TransformersEngine:
    """Samples from the policy object itself; there is nothing to sync."""

    def __init__(self, policy: Any, tokenizer: Any, *, eos_token_ids: list[int], banned_token_ids: list[int]):
        self._policy = policy
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._banned = banned_token_ids

    def sync_weights(self, policy: Any) -> None:
        self._policy = policy

    @torch.no_grad()
    def generate(self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """Completions without log-probabilities: they are the policy's own, which the trainer computes anyway."""
        rows = [prompt for prompt in prompts for _ in range(sampling.num_generations)]
        device = next(self._policy.parameters()).device
        inputs = self._tokenizer.pad(
            {"input_ids": [row.prompt_ids for row in rows]}, padding_side="left", return_tensors="pt"
        ).to(device)
        vision = joined([row.vision_inputs for row in rows]) | token_types(self._policy, inputs["input_ids"])
        was_training = self._policy.training
        self._policy.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self._policy.generate(**inputs, **vision, **self._arguments(sampling))
        self._policy.train(was_training)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        completions = [self._completion(ids) for ids in new_tokens]
        count = sampling.num_generations
        return [completions[i : i + count] for i in range(0, len(completions), count)]

    def _arguments(self, sampling: Sampling) -> dict:
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
        return {
            "max_new_tokens": sampling.max_tokens,
            "repetition_penalty": sampling.repetition_penalty,
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
        return Completion(token_ids=kept, logprobs=[], text=text, is_truncated=end is None)
