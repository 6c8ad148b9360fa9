"""Chains from the model in process, or from one behind an endpoint; each is kept, so that it is written once."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from r1v_rl.checkpoints import file_sha256
from r1v_rl.data.chat import prompt_text
from r1v_rl.data.images import image_hash
from r1v_rl.distill.config import Recipe
from r1v_rl.distill.records import Chain
from r1v_rl.durable import fault_point
from r1v_rl.errors import UserError
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import prompt_encoder
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.budget import Budget
from r1v_rl.scoring.chat_model import ChatModel, ChatQuestion
from r1v_rl.scoring.format import prompt_opens_think, with_prompt_think
from r1v_rl.scoring.judging import question_text
from r1v_rl.scoring.replies import ReplyStore, content_key
from r1v_rl.types import Example


@dataclass(frozen=True, slots=True)
class Request:
    """A row to be answered, with its own limits."""

    example: Example
    max_tokens: int
    repetition_penalty: float = 1.0


class Generator(Protocol):
    """Writes chains, `sampling.num_generations` of them for each request, in order; limits are the requests' own."""

    name: str
    weights_sha256: str

    def __call__(self, requests: Sequence[Request], sampling: Sampling, *, label: str) -> list[list[Chain]]: ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine must have room for."""

    max_model_len: int
    """Tokens of the longest prompt and of a chain of full length."""
    max_images: int
    """Of one prompt."""


class ModelGenerator:
    """The recipe's own model; its engine starts with the first chain that is not kept yet.

    Chains of a batch are kept together, so that a run that was killed goes on with the same batches, and writes what
    an undisturbed one writes.
    """

    def __init__(self, recipe: Recipe, processor: Any, store: ReplyStore, stack: ExitStack, limits: "EngineLimits"):
        self._recipe, self._config, self._processor = recipe, recipe.distill, processor
        self._store, self._stack, self._limits = store, stack, limits
        self._encode = prompt_encoder(
            processor,
            device="cuda" if torch.cuda.is_available() else "cpu",
            with_vision_inputs=not self._config.use_vllm,
            template_kwargs=recipe.template_kwargs,
        )
        self._engine: RolloutEngine | None = None
        self.name = str(self._config.model_name_or_path)
        self.weights_sha256 = weights_sha256(self.name)

    def __call__(self, requests: Sequence[Request], sampling: Sampling, *, label: str) -> list[list[Chain]]:
        keys = [self._key(request, sampling) for request in requests]
        size = self._config.generation_batch_size
        with tqdm(total=len(requests), desc=label, disable=None, unit="row") as bar:
            for start in range(0, len(requests), size):
                block = dict(zip(keys[start : start + size], requests[start : start + size], strict=True))
                missing = {key: request for key, request in block.items() if key not in self._store}
                if missing:
                    self._store.put(*self._generated(missing, sampling))
                    fault_point("chains_written")
                bar.update(len(requests[start : start + size]))
        return [[Chain(**chain) for chain in self._store.get(key)] for key in keys]

    def _key(self, request: Request, sampling: Sampling) -> str:
        config = self._config
        text = prompt_text(self._processor, request.example, self._recipe.template_kwargs)
        images = [image_hash(image) for image in request.example.images]
        how = [config.seed, config.dtype, config.use_vllm, self._recipe.data.max_image_tiles]
        drawn = asdict(_with_limits(sampling, [request]))
        return content_key("chains", self.weights_sha256, text, images, drawn, how)

    def _generated(self, missing: dict[str, Request], sampling: Sampling) -> list[tuple[str, list[dict[str, Any]]]]:
        requests = list(missing.values())
        prompts = [self._encode(request.example) for request in requests]
        seed = int.from_bytes(hashlib.sha256("".join(missing).encode()).digest()[:4], "big") >> 1
        groups = self.engine().generate(prompts, _with_limits(sampling, requests), seed=seed)
        return [
            (key, [asdict(Chain(c.text, len(c.token_ids), c.is_truncated)) for c in group])
            for key, group in zip(missing, groups, strict=True)
        ]

    def engine(self) -> RolloutEngine:
        """Started once."""
        if self._engine is None:
            config = self._config
            vllm: dict[str, Any] = {
                "seed": config.seed,
                "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
                "kv_cache_memory_bytes": config.vllm_kv_cache_memory_bytes,
                "tensor_parallel_size": config.vllm_tensor_parallel_size,
            }
            self._engine = self._stack.enter_context(
                standalone_engine(
                    self.name,
                    self._processor,
                    use_vllm=config.use_vllm,
                    dtype=config.dtype,
                    max_model_len=self._limits.max_model_len,
                    max_images=self._limits.max_images,
                    **vllm,
                )
            )
        return self._engine


class EndpointGenerator:
    """A model behind an endpoint; the penalty goes with each request where it is not 1 (vLLM knows the argument)."""

    def __init__(self, recipe: Recipe, model: ChatModel, processor: Any, store: ReplyStore, budget: Budget):
        self._recipe, self._model, self._processor = recipe, model, processor
        self._store, self._budget = store, budget
        self.name, self.weights_sha256 = model.model, ""

    def __call__(self, requests: Sequence[Request], sampling: Sampling, *, label: str) -> list[list[Chain]]:
        questions = [question for request in requests for question in self.questions(request, sampling)]
        replies = iter(self._model.ask(questions, self._store, label=label, budget=self._budget))
        found = []
        for request in requests:
            opened = prompt_opens_think(prompt_text(self._processor, request.example, self._recipe.template_kwargs))
            group = [next(replies) for _ in range(sampling.num_generations)]
            found.append([self._chain(reply.text, reply.error, opened, request) for reply in group])
        return found

    def questions(self, request: Request, sampling: Sampling) -> list[ChatQuestion]:
        """One for each chain, told apart by their seeds."""
        parameters: dict[str, Any] = {"max_completion_tokens": request.max_tokens}
        if request.repetition_penalty != 1.0:
            parameters["extra_body"] = {"repetition_penalty": request.repetition_penalty}
        text = question_text(request.example).replace("<image>\n", "")
        return [
            ChatQuestion(
                request.example.id,
                text,
                request.example.images,
                {**parameters, "temperature": sampling.temperature, "seed": self._recipe.distill.seed + number},
            )
            for number in range(sampling.num_generations)
        ]

    def _chain(self, text: str | None, error: str, opened: bool, request: Request) -> Chain:
        """As it would follow the prompt of the recipe's model."""
        if text is None:
            return Chain("", 0, True, problem=f"not generated: {error}")
        full = with_prompt_think(text, None)
        completion = full.removeprefix("<think>").removeprefix("\n") if opened else full
        count = count_tokens(self._processor, completion)
        return Chain(completion, count, count >= request.max_tokens)


def count_tokens(processor: Any, completion: str) -> int:
    """Tokens of a completion, its end token included."""
    return len(processor.tokenizer(completion, add_special_tokens=False)["input_ids"]) + 1


def weights_sha256(model: str) -> str:
    """sha256 over the names and contents of a model's weight files."""
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"`model_name_or_path` must be a folder with safetensors files, or a hub id; received {model}")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _with_limits(sampling: Sampling, requests: Sequence[Request]) -> Sampling:
    return replace(
        sampling,
        max_tokens=[request.max_tokens for request in requests],
        repetition_penalty=[request.repetition_penalty for request in requests],
    )
