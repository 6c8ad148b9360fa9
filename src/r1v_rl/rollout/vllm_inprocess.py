"""Rollouts by vLLM inside the training process: unique prompts with `n` completions, weights handed over in memory."""

import os
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

from r1v_rl.models.parts import PARTS
from r1v_rl.rollout.engine import OnGroup, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.rollout.vllm_requests import (
    CACHE_RESETS,
    check_prompt,
    completion,
    engine_options,
    sampling_parameters,
)
from r1v_rl.rollout.weights import stream_disk_weights, trained_parts
from r1v_rl.runtime import children_prepared
from r1v_rl.types import Completion


class VllmEngine:
    """One vLLM engine in this process.

    Create accelerate's state first: the engine makes a process group of its own where there is none.

    Args:
        model: Folder (or hub id) of the starting model; its weights are replaced at the first sync.
        dtype: That of the policy, so that both compute the same.
        max_model_len: Longest prompt plus completion, in tokens.
        banned_token_ids: Never sampled (image placeholders).
        eos_token_ids: A completion that ends on one of them was not truncated.
        temperature: Of the run; log-probabilities are reported at it.
        max_images: Most images in one prompt.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        banned_token_ids: list[int],
        eos_token_ids: list[int],
        temperature: float,
        max_images: int,
        seed: int = 0,
        gpu_memory_utilization: float = 0.3,
        kv_cache_memory_bytes: int | None = None,
        tensor_parallel_size: int = 1,
    ):
        self._banned = banned_token_ids
        self._eos = set(eos_token_ids)
        on_cpu = not torch.cuda.is_available()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if on_cpu:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the first sampled batch would compile for 9 s
            if kv_cache_memory_bytes is None:  # the variable comes before the argument
                os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        with _random_states_kept(), children_prepared():
            from vllm import LLM

            options = engine_options(
                dtype=dtype,
                max_model_len=max_model_len,
                seed=seed,
                temperature=temperature,
                max_images=max_images,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                tensor_parallel_size=tensor_parallel_size,
                on_cpu=on_cpu,
            )
            self._llm = LLM(model=model, disable_log_stats=True, **options)

        self._tokenizer = self._llm.get_tokenizer()
        self._policy: weakref.ref | None = None
        self._version: int | None = None

    def sync_weights(self, policy: nn.Module, version: int = 0) -> None:
        """The first time everything, then what trains: a frozen tower, or the language model where the projector alone
        trains, stays where it is."""
        known = self._policy is not None and self._policy() is policy
        weights = stream_disk_weights(policy, trained_parts(policy) if known else PARTS)
        self._policy = weakref.ref(policy)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.reset_caches()
        self._version = version

    def reset_caches(self) -> None:
        """Forget prefixes and image features of older weights."""
        for reset in CACHE_RESETS:
            getattr(self._llm.llm_engine, reset)()

    def generate(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        groups: dict[int, list[Completion]] = {}

        def finished(number: int, output: Any) -> None:
            check_prompt(prompts[number], output.prompt_token_ids)
            groups[number] = [self._completion(sample) for sample in output.outputs]
            if on_group is not None:
                on_group(number, groups[number])

        requests = [self._request(prompt) for prompt in prompts]
        with _random_states_kept():
            torch.manual_seed(seed)  # seeds of single requests break chunked prefills on a CPU, and are slower
            parameters = [self._parameters(sampling, *limits) for limits in sampling.limits(len(prompts))]
            self._run(requests, parameters, finished)
        return [groups[number] for number in range(len(prompts))]

    def _run(self, requests: list[dict], parameters: list[Any], finished: Callable[[int, Any], None]) -> None:
        """`LLM.generate`, which says nothing before all is done; `finished` is told of each request by its number."""
        engine = self._llm.llm_engine
        ids = self._llm.enqueue(requests, parameters, use_tqdm=False)
        first = int(ids[0].partition("-")[0]) if ids else 0  # vLLM counts requests, and adds random letters
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    finished(int(output.request_id) - first, output)
        except BaseException:  # Ctrl-C too: what is left of the requests would stay in the engine
            engine.abort_request(ids, internal=True)
            raise

    def stream(
        self, prompt: EncodedPrompt, sampling: Sampling, *, seed: int, on_text: Callable[[str], None]
    ) -> Completion:
        """One completion; `on_text` receives its text as vLLM detokenizes it."""
        engine, shown, output = self._llm.llm_engine, 0, None
        with _random_states_kept():
            torch.manual_seed(seed)
            request_id = engine.add_request(
                "stream", self._request(prompt), self._parameters(sampling, *sampling.limits(1)[0], detokenize=True)
            )
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        text = output.outputs[0].text
                        on_text(text[shown:])
                        shown = len(text)
            except BaseException:  # Ctrl-C too: what is left of the request would stay in the engine
                engine.abort_request([request_id])
                raise
        assert output is not None
        check_prompt(prompt, output.prompt_token_ids)
        return self._completion(output.outputs[0])

    def token_logprobs(self, prompts: list[EncodedPrompt], texts: list[list[int]]) -> list[list[float]]:
        """vLLM's log-probabilities of prompts, of which the texts are the end."""
        from vllm import SamplingParams

        requests = [self._request(prompt, ids) for prompt, ids in zip(prompts, texts, strict=True)]
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with _random_states_kept():
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        return [
            [position[token].logprob for position, token in zip(output.prompt_logprobs[-len(ids) :], ids, strict=True)]
            for output, ids in zip(outputs, texts, strict=True)
        ]

    @staticmethod
    def _request(prompt: EncodedPrompt, text: Sequence[int] = ()) -> dict:
        request: dict = {"prompt_token_ids": [*prompt.text_ids, *text]}
        if prompt.images:
            request["multi_modal_data"] = {"image": prompt.images}
        return request

    def _parameters(self, sampling: Sampling, max_tokens: int, repetition_penalty: float, *, detokenize: bool = False):
        from vllm import SamplingParams

        given = sampling_parameters(sampling, max_tokens, repetition_penalty, self._banned)
        return SamplingParams(**{"flat_logprobs": True, **given, "detokenize": detokenize or given["detokenize"]})

    def _completion(self, sample) -> Completion:
        ids, logprobs = list(sample.token_ids), list(sample.logprobs.logprobs)
        return completion(self._tokenizer, self._eos, ids, logprobs, self._version)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """vLLM reseeds torch, random and numpy when it starts, and draws from torch's stream when it samples: training
    must not depend on either."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
