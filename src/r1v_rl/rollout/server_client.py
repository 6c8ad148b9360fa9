"""One rollout server as its clients see it: vLLM's paths, and what a reply must be to count."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from r1v_rl.errors import UserError
from r1v_rl.rollout.server_side import GENERATE, WEIGHT_VERSION
from r1v_rl.rollout.vllm_requests import CACHE_RESETS
from r1v_rl.rollout.vllm_server import API_KEY
from r1v_rl.tracking.redaction import redact

_LOADING = "loading"
_COUNTED = re.compile(r"^vllm:(?:prompt|generation)_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)


class ServerFault(Exception):
    """A server did not give what was asked of it; another one, or the same later, may.

    Args:
        answers: Whether something listens there. A server that is gone may come back; one that listens and does not
            answer hangs.
    """

    def __init__(self, said: str, *, answers: bool):
        super().__init__(said)
        self.answers = answers


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server made of one prompt."""

    prompt_ids: list[int]
    samples: list[tuple[list[int], list[float]]]
    """Token ids and log-probabilities of each completion."""
    prompt_logprobs: list[dict[str, dict] | None] | None
    weight_version: str
    stopped: list[bool]
    """Of each completion: whether the server was told to end it before it was whole."""


class ServerClient:
    """Requests to one server, within one event loop.

    Args:
        url: Up to the port, without `/v1`.
        key: Sent as bearer token.
        timeout_s: Longest wait for any answer but a completion and the loading of weights.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float):
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=timeout_s,
            # an idle connection that the server closes would look like a lost server
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # it may name a proxy, and the key of another host
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def version(self) -> str:
        """Of the weights it holds, as `load` has named them; the engine itself answers."""
        return str((await self._json("GET", "/weight_info")).get("weight_version"))

    async def settings(self) -> dict:
        """vLLM's configuration."""
        return (await self._json("GET", "/server_info", params={"config_format": "json"})).get("vllm_config") or {}

    async def tokens_done(self) -> float:
        """Prompt and completion tokens since it started."""
        counts = _COUNTED.findall((await self._send("GET", "/metrics")).text)
        if not counts:
            raise UserError(f"{self.url} counts no tokens under /metrics: start it without --disable-log-stats")
        return sum(float(count) for count in counts)

    async def load(self, files: Sequence[str], version: str, *, timeout_s: float) -> None:
        """Weights from files, every cache of older ones emptied; under no name that counts until all of it is done."""
        await self._json("POST", "/update_weight_version", json={"new_version": _LOADING})
        rpc = {"method": "load_weight_files", "kwargs": {"paths": list(files)}}
        missing = (await self._json("POST", "/collective_rpc", json=rpc, timeout=timeout_s)).get("results") or [None]
        if missing[0]:
            raise ServerFault(f"it does not see {missing[0][0]} (`weight_sync_dir`)", answers=True)
        for reset in CACHE_RESETS:
            response = await self._send("POST", f"/{reset}")
            if response.text and response.json().get("success") is False:
                raise ServerFault(f"{reset} was refused: it still answers something", answers=True)
        await self._json("POST", "/update_weight_version", json={"new_version": version})

    async def generate(self, body: dict) -> Reply:
        """Completions of one prompt; as long as that takes."""
        timeout = httpx.Timeout(self._http.timeout.connect, read=None)
        response = await self._send("POST", GENERATE, json=body, timeout=timeout)
        try:
            content = response.json()
            choices = sorted(content["choices"], key=lambda choice: choice["index"])
            samples = [_sample(choice) for choice in choices]
            stopped = [choice["finish_reason"] == "abort" for choice in choices]
            prompt_ids = [int(token) for token in content["prompt_token_ids"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServerFault(f"its reply is no completion ({error!r})", answers=True) from error
        if len(samples) != body["sampling_params"]["n"]:
            raise ServerFault(f"it sent {len(samples)} completions in place of those asked for", answers=True)
        version = response.headers.get(WEIGHT_VERSION, "")
        return Reply(prompt_ids, samples, content.get("prompt_logprobs"), version, stopped)

    async def stop(self, request_ids: Sequence[str], *, timeout_s: float) -> None:
        """Have `generate` of these requests (`request_id` of their bodies) return what there is of their completions.
        One that the server does not know yet goes on."""
        assert request_ids, "no name stands for all"
        names = [f"generate-tokens-{name}" for name in request_ids]
        await self._send("POST", "/abort_requests", json={"request_ids": names}, timeout=timeout_s)

    async def _json(self, method: str, path: str, **request: Any) -> dict:
        response = await self._send(method, path, **request)
        try:
            content = response.json()
        except ValueError as error:
            raise ServerFault(f"{path} did not answer in JSON", answers=True) from error
        if not isinstance(content, dict):
            raise ServerFault(f"{path} answered {str(content)[:100]}", answers=True)
        return content

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **request)
        except httpx.ConnectError as error:
            raise ServerFault(f"nothing answers there ({error})", answers=False) from error
        except httpx.TimeoutException as error:
            raise ServerFault(f"{path}: no answer ({type(error).__name__})", answers=True) from error
        except httpx.HTTPError as error:
            raise ServerFault(f"{path}: the connection was lost ({error!r})", answers=False) from error
        if response.status_code in (401, 403):
            raise UserError(
                f"the rollout server {self.url} refuses the key: set {API_KEY} in this run's environment to the one "
                f"that it was started with"
            )
        if response.status_code == 404:
            raise UserError(
                f"the rollout server {self.url} has no {path}: start it with `r1v-rl chat --serve --takes_weights true`"
            )
        said = redact(response.text[:500])
        if response.status_code >= 500 or response.status_code in (408, 409, 425, 429):
            raise ServerFault(f"{path}: status {response.status_code}: {said}", answers=True)
        if response.status_code != 200:
            raise UserError(f"the rollout server {self.url} refuses {path} ({response.status_code}): {said}")
        return response


def picture_part(image: Image.Image) -> dict[str, str]:
    """A picture as a request carries it, bit by bit what it is."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"type": "image_url", "url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def _sample(choice: dict) -> tuple[list[int], list[float]]:
    ids = [int(token) for token in choice["token_ids"]]
    logprobs = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    if len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
    return ids, logprobs
