"""What runs inside vLLM's server when it takes weights: the loading of files, and the gate before every path."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

from safetensors import safe_open
from torch import Tensor

WEIGHT_VERSION = "x-weight-version"
"""Header of a completion's reply: the version that the server held before it sampled and still held after; empty where
the two differ."""
GENERATE = "/inference/v1/generate"


class WeightFiles:
    """Mixed into vLLM's workers (`--worker-extension-cls`): `collective_rpc` may call `load_weight_files`."""

    def load_weight_files(self, paths: list[str]) -> list[str] | None:
        """Put the tensors of these safetensors files, under their names on disk, in the place of the present ones.

        Returns:
            The files that are not there, and then nothing was changed: an exception would end the engine.
        """
        if missing := [path for path in paths if not os.path.isfile(path)]:
            return missing
        self.reload_weights(weights_iterator=_tensors(paths))  # type: ignore[attr-defined]
        return None


class Gate:
    """ASGI (`--middleware`): every path needs the key, vLLM's own check leaves its development paths open; and a
    completion says which weights it was made with."""

    def __init__(self, app: Any):
        self._app = app
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("a server that takes weights needs a key in VLLM_API_KEY")
        self._wanted = hashlib.sha256(f"Bearer {key}".encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if scope["type"] != "http" or not secrets.compare_digest(hashlib.sha256(sent).digest(), self._wanted):
            return await _refuse(scope, send)
        if scope["path"] == GENERATE:
            send = await _with_version(scope["app"].state.engine_client, send)
        await self._app(scope, receive, send)


async def _refuse(scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"the key is missing or wrong\n"})


async def _with_version(engine: Any, send: Any) -> Any:
    before = await engine.get_weight_version()

    async def named(message: Any) -> None:
        if message["type"] == "http.response.start":  # when the last token is there
            after = await engine.get_weight_version()
            version = before if before == after else ""
            message["headers"] = [*message["headers"], (WEIGHT_VERSION.encode(), version.encode())]
        await send(message)

    return named


def _tensors(paths: list[str]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                yield name, file.get_tensor(name)
