"""Rollouts by vLLM servers, started for the run or given by address, all holding the policy's present weights."""

import copy
import hashlib
import logging
import os
import secrets
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.models.parts import PARTS
from r1v_rl.rollout.dispatch import Dispatch
from r1v_rl.rollout.engine import OnGroup, Sampling
from r1v_rl.rollout.partial import Wanted, put_back, wanted, whole_groups
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.rollout.server_client import Reply, ServerClient, picture_part
from r1v_rl.rollout.server_keeper import Server, ServerKeeper, Weights
from r1v_rl.rollout.vllm_requests import check_prompt, completion, sampling_parameters
from r1v_rl.rollout.vllm_server import API_KEY, LOOPBACK, check_options, free_port, start_server
from r1v_rl.rollout.weight_files import WeightFolder
from r1v_rl.rollout.weights import stream_disk_weights, trained_parts
from r1v_rl.scoring.loader import run_async
from r1v_rl.types import Completion

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ServerSettings:
    """Which servers, and how long they are waited for."""

    urls: Sequence[str] = ()
    """Addresses; none: the run starts its own."""
    num_servers: int = 1
    devices: Sequence[str] | None = None
    """CUDA_VISIBLE_DEVICES of each of the run's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """More options of `vllm serve` for the run's own."""
    timeout_s: float = 45.0
    start_timeout_s: float = 240.0
    weight_folder: str | None = None
    """Where weights are handed over; None is main memory."""
    log_folder: Path = Path(".")

    def __post_init__(self) -> None:
        if self.num_servers < 1 or not self.timeout_s > 0 or not self.start_timeout_s > 0:
            raise RecipeError(
                f"`vllm_num_servers` must be at least 1, `rollout_timeout_s` and `vllm_server_timeout` above 0; "
                f"received {self.num_servers}, {self.timeout_s}, {self.start_timeout_s}"
            )
        if self.devices is not None and len(self.devices) != self.num_servers:
            raise RecipeError(
                f"`vllm_server_devices` must name the GPUs of each of the {self.num_servers} servers, received "
                f"{len(self.devices)} entries"
            )
        check_options(self.options)
        for url in self.urls:
            check_address(url)


def check_address(url: str) -> None:
    """Raises RecipeError where a server is no address, or one of another machine and there is no key for it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise RecipeError(f"`vllm_server_base_url` must be like http://HOST:PORT, received {url}")
    if parts.username or parts.password:
        raise RecipeError(f"`vllm_server_base_url` must hold no password: set the environment variable {API_KEY}")
    if parts.hostname not in LOOPBACK and not os.environ.get(API_KEY):
        raise RecipeError(
            f"`vllm_server_base_url` names another machine ({parts.hostname}): set the environment variable {API_KEY} "
            "to the key that the server was started with"
        )


class ServerEngine:
    """A `RolloutEngine` of one or several servers. Every process of the run asks all of them; the first one owns them.

    Args:
        model: Yields the folder that the run's own servers load; left when the engine is closed.
        engine_options: Of vLLM, as `vllm_requests.engine_options` has them.
        tokenizer: Of the policy.
        banned_token_ids: Never sampled (image placeholders).
        eos_token_ids: A completion that ends on one of them was not truncated.

    Raises:
        UserError: On every process, where a server does not start, or is not what the run needs.
    """

    def __init__(
        self,
        model: AbstractContextManager[str],
        engine_options: dict[str, Any],
        settings: ServerSettings,
        accelerator: Accelerator,
        *,
        tokenizer: Any,
        banned_token_ids: list[int],
        eos_token_ids: list[int],
    ):
        self._settings, self._accelerator = settings, accelerator
        self._tokenizer = copy.deepcopy(tokenizer)  # decodes in another thread while the trainer's encodes
        self._banned, self._eos = banned_token_ids, set(eos_token_ids)
        self._policy: weakref.ref | None = None
        self._weights: Weights | None = None
        self._keeper: ServerKeeper | None = None
        self._folder: WeightFolder | None = None
        self.metrics: dict[str, float] = {}
        """Of the last `generate`, by their logged names."""
        own_key = secrets.token_urlsafe(32)  # of servers that nobody else shall use, on this machine either
        self._key = os.environ.get(API_KEY) or (None if settings.urls else own_key)
        self._urls = list(settings.urls)
        stack = ExitStack()
        self.close = weakref.finalize(self, stack.close)
        """End the run's own servers. Called at the end of the process too."""
        # on every process: they write a sharded model together
        folder = "" if settings.urls else stack.enter_context(model)
        self._urls, self._key = self._on_main(lambda: self._begin(stack, folder, engine_options))

    def sync_weights(self, policy: nn.Module, version: int = 0) -> None:
        """Write what trains (the first time everything) and wait until every server that answers holds it."""
        known = self._policy is not None and self._policy() is policy
        self._policy = weakref.ref(policy)
        self._accelerator.wait_for_everyone()  # no process has anything under way with older weights
        trained = trained_parts(policy)
        number = self._weights.number + 1 if self._weights is not None else 0
        mistakes: list[UserError] = []
        files = self._written(policy, trained, f"trained-{number}", mistakes)
        frozen = None if known else self._written(policy, set(PARTS) - trained, f"frozen-{number}", mistakes)
        self._weights = self._on_main(lambda: self._hand_over(number, version, files, frozen, mistakes))

    def generate(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """As `RolloutEngine`. A completion's tokens follow from seed, prompt and weights, up to rounding: what shares a
        batch with it depends on timing."""
        return run_async(self.generate_async(prompts, sampling, seed=seed, on_group=on_group))

    async def generate_async(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """The same as a coroutine, for another thread's event loop."""
        weights = self._weights
        assert weights is not None, "sync first"
        asked = [Wanted(group) for group in range(len(prompts))]
        bodies, rows = self._bodies(prompts, sampling, seed, asked), [prompt.example.id for prompt in prompts]
        groups: dict[int, list[Completion]] = {}

        def finished(number: int, reply: Reply) -> None:
            groups[number] = self._found(prompts[number], asked[number], bodies[number], reply, weights.step)
            if on_group is not None:
                on_group(number, groups[number])

        await self._dispatched(weights.version, lambda dispatch: dispatch.all(bodies, rows, finished))
        return [groups[number] for number in range(len(prompts))]

    def generate_first(
        self,
        prompts: list[EncodedPrompt],
        sampling: Sampling,
        *,
        seed: int,
        begun: Sequence[Sequence[Completion]],
        enough: Callable[[Set[int]], bool],
    ) -> list[list[Completion]]:
        """As `PartialEngine`. Groups that are begun are asked for first."""
        weights, asked = self._weights, wanted(begun)
        assert weights is not None, "sync first"
        bodies = self._bodies(prompts, sampling, seed, asked)
        rows = [prompts[one.group].example.id for one in asked]

        def no_more(answered: Set[int]) -> bool:
            return enough(whole_groups(asked, answered, len(prompts)))

        replies = run_async(self._dispatched(weights.version, lambda dispatch: dispatch.first(bodies, rows, no_more)))
        sent = zip(asked, bodies, replies, strict=True)
        found = [r and self._found(prompts[one.group], one, body, r, weights.step) for one, body, r in sent]
        return put_back(begun, asked, found)

    def token_logprobs(self, prompts: list[EncodedPrompt], texts: list[list[int]]) -> list[list[float]]:
        """vLLM's log-probabilities of prompts, of which the texts are the end."""
        scored = {"n": 1, "max_tokens": 1, "temperature": 0.0, "logprobs": 0, "prompt_logprobs": 0, "detokenize": False}
        bodies = [self._body(prompt, scored, ids) for prompt, ids in zip(prompts, texts, strict=True)]
        found = []
        for reply, ids in zip(self._ask(bodies, prompts), texts, strict=True):
            positions = (reply.prompt_logprobs or [])[-len(ids) :]
            found.append([float((p or {})[str(token)]["logprob"]) for p, token in zip(positions, ids, strict=True)])
        return found

    # ---- servers and weights, on the first process ------------------------------------------------------------------

    def _begin(self, stack: ExitStack, folder: str, options: dict[str, Any]) -> tuple[list[str], str | None]:
        settings = self._settings
        servers = [Server(url.rstrip("/")) for url in settings.urls]
        if not servers:
            servers = [self._own_server(number, folder, options) for number in range(settings.num_servers)]
        self._folder = WeightFolder(settings.weight_folder)
        stack.callback(self._folder.remove)
        self._keeper = ServerKeeper(
            servers,
            self._key,
            timeout_s=settings.timeout_s,
            start_timeout_s=settings.start_timeout_s,
            check=partial(check_settings, options),
        )
        stack.callback(self._keeper.close)
        return [server.url for server in servers], self._key

    def _own_server(self, number: int, folder: str, options: dict[str, Any]) -> Server:
        settings, port = self._settings, free_port()
        log = settings.log_folder / f"server-{number}.log"
        log.unlink(missing_ok=True)
        start = partial(
            start_server,
            folder,
            ["policy"],
            {**options, **settings.options},
            port=port,
            key=self._key,
            takes_weights=True,
            devices=settings.devices[number] if settings.devices else None,
            log=log,
        )
        return Server(f"http://{LOOPBACK[0]}:{port}", start, log)

    def _written(self, policy: nn.Module, parts: set[str], name: str, mistakes: list[UserError]) -> tuple[str, ...]:
        """The files that the first process writes; the others take part where weights are spread."""
        weights = stream_disk_weights(policy, parts)
        try:
            return tuple(self._folder.write(weights, name)) if self._folder is not None else ()
        except UserError as error:
            mistakes.append(error)
            return ()
        finally:
            deque(weights, maxlen=0)  # who leaves early keeps the others waiting

    def _hand_over(
        self,
        number: int,
        step: int,
        files: tuple[str, ...],
        frozen: tuple[str, ...] | None,
        mistakes: list[UserError],
    ) -> Weights:
        if mistakes:
            raise mistakes[0]
        assert self._folder is not None and self._keeper is not None
        before = self._weights
        if before is None or frozen is not None:
            weights = Weights(secrets.token_hex(8), number, step, frozen or (), files)
        else:
            weights = Weights(before.run, number, step, before.frozen, files)
        self._keeper.hold(weights)
        self._folder.keep(self._keeper.files_in_use())
        return weights

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on the first process, or the mistake that it met there, on all of them."""
        outcome: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            try:
                outcome = [action(), None]
            except UserError as error:
                outcome = [None, str(error)]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    # ---- requests ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _body(prompt: EncodedPrompt, parameters: dict[str, Any], text: Sequence[int] = ()) -> dict:
        return {
            "token_ids": [*prompt.text_ids, *text],
            "content_parts": [picture_part(image) for image in prompt.images] or None,
            "sampling_params": parameters,
            "return_token_ids": True,
            "request_id": secrets.token_hex(16),
        }

    def _ask(self, bodies: list[dict], prompts: list[EncodedPrompt]) -> list[Reply]:
        assert self._weights is not None, "sync first"
        rows = [prompt.example.id for prompt in prompts]
        return run_async(self._dispatched(self._weights.version, lambda dispatch: dispatch.all(bodies, rows)))

    def _bodies(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, seed: int, asked: Sequence[Wanted]
    ) -> list[dict]:
        limits, bodies = sampling.limits(len(prompts)), []
        for number, one in enumerate(asked):
            whole = {**sampling_parameters(sampling, *limits[one.group], self._banned), "seed": _seed(seed, number)}
            bodies.append(self._body(prompts[one.group], one.parameters(whole), one.token_ids))
        return bodies

    def _found(self, prompt: EncodedPrompt, one: Wanted, body: dict, reply: Reply, step: int) -> list[Completion]:
        """What a reply makes of the completions that were asked for."""
        check_prompt(prompt, reply.prompt_ids, one.token_ids)
        found = []
        for (ids, logprobs), was_stopped in zip(reply.samples, reply.stopped, strict=True):
            all_of_it = completion(self._tokenizer, self._eos, *one.continued(ids, logprobs, step))
            is_short = all_of_it.is_truncated and len(ids) < body["sampling_params"]["max_tokens"]
            all_of_it.is_partial = was_stopped and is_short
            found.append(all_of_it)
        return found

    async def _dispatched(self, version: str, use: Callable[[Dispatch], Awaitable[_T]]) -> _T:
        settings = self._settings
        clients = [ServerClient(url, self._key, settings.timeout_s) for url in self._urls]
        dispatch = Dispatch(
            clients,
            version,
            first=self._accelerator.process_index,
            timeout_s=settings.timeout_s,
            patience_s=settings.timeout_s + (0 if settings.urls else settings.start_timeout_s),
            watch=self._keeper.raise_error if self._keeper is not None else lambda: None,
        )
        try:
            return await use(dispatch)
        finally:
            self.metrics = {"rollout/servers": dispatch.num_ready, "rollout/retries": dispatch.retries}
            for client in clients:
                await client.close()


def check_settings(options: dict[str, Any], url: str, found: dict) -> None:
    """Raises UserError where a server's configuration would give other completions or log-probabilities than asked."""
    model = found.get("model_config", {})
    wanted = {
        "dtype": (f"torch.{options['dtype']}", "dtype"),
        "logprobs_mode": (options["logprobs_mode"], "temperature"),
    }
    for name, (needed, key) in wanted.items():
        if model.get(name) != needed:
            raise UserError(
                f"the rollout server {url} runs with {name} {model.get(name)}, the run needs {needed}: start "
                f"`r1v-rl chat --serve --takes_weights true` with the run's `--{key}`"
            )
    if (model.get("max_model_len") or 0) < options["max_model_len"]:
        raise UserError(
            f"the rollout server {url} holds {model.get('max_model_len')} tokens, the run needs "
            f"{options['max_model_len']} for a prompt and its completion: start it with `--vllm_max_model_length "
            f"{options['max_model_len']}`"
        )


def _seed(seed: int, number: int) -> int:
    """Of one prompt: vLLM adds 0, 1, 2, ... for its completions, so neighbouring ones must not."""
    return int.from_bytes(hashlib.sha256(f"{seed}-{number}".encode()).digest()[:4]) >> 1
