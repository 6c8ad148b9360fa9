"""A rollout server for injecting faults: vLLM's paths, an invented completion, and whatever goes wrong on request."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from r1v_rl.rollout.server_side import GENERATE, WEIGHT_VERSION

SETTINGS = {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "max_model_len": 256}


class FakeServer:
    """Serves on a port of its own until `stop`; `start` again is a restart, with the weights it was born with.

    Args:
        seconds: How long a request for completions, given its body, takes; told to stop meanwhile it returns the first
            of several completions whole, and of the others the first token.
        wrong: Given path and number of the request on that path, from 0: `hang`, `half`, a status, a text in place of
            the answer, or None where nothing is wrong.
    """

    def __init__(
        self,
        wrong: Callable[[str, int], Any] = lambda path, number: None,
        seconds: Callable[[dict], float] = lambda body: 0.0,
    ):
        self.wrong, self.seconds = wrong, seconds
        self.seen: list[str] = []
        """Paths in order; a completion is written with the version that it was made with."""
        self.bodies: list[dict] = []
        """Of the requests for completions."""
        self.settings = dict(SETTINGS)
        self._stopped: dict[str, threading.Event] = defaultdict(threading.Event)
        self.tokens = 0
        self._counts: dict[str, int] = {}
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self.held = "default"
        self._stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: dict) -> tuple[dict | str, dict]:
        """What vLLM would say, and its headers."""
        if path == "/update_weight_version":
            self.held = body["new_version"]
        if path == "/abort_requests":
            for name in body["request_ids"]:
                self._stopped[name].set()
        if path == GENERATE:
            return self._completions(body), {WEIGHT_VERSION: self.held}
        if path == "/metrics":
            return f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n', {}
        return {
            "/weight_info": {"weight_version": self.held},
            "/server_info": {"vllm_config": self.model_config()},
        }.get(path, {"success": True}), {}

    def model_config(self) -> dict:
        return {"model_config": self.settings}

    def _completions(self, body: dict) -> dict:
        self.bodies.append(body)
        stopped = self._stopped[f"generate-tokens-{body.get('request_id')}"]
        was_stopped, count = stopped.wait(self.seconds(body)), body["sampling_params"]["n"]
        self.tokens += 2
        tokens = [{"token": f"token_id:{i}", "logprob": -0.5} for i in (5, 6)]
        whole = {"token_ids": [5, 6], "logprobs": {"content": tokens}, "finish_reason": "stop"}
        part = {"token_ids": [5], "logprobs": {"content": tokens[:1]}, "finish_reason": "abort"}
        choices = [part if was_stopped and (i or count == 1) else whole for i in range(count)]
        return {
            "choices": [{"index": i, **choice} for i, choice in enumerate(choices)],
            "prompt_token_ids": body["token_ids"],
        }


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        self._respond({})

    def do_POST(self) -> None:
        self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

    def _respond(self, body: dict) -> None:
        fake, path = self.fake, self.path.split("?")[0]
        number = fake._counts[path] = fake._counts.get(path, -1) + 1
        wrong = fake.wrong(path, number)
        fake.seen.append(f"{path} {fake.held}" if path == GENERATE else path)
        if wrong == "hang":
            fake._stopping.wait(60)
            return
        if isinstance(wrong, float):
            time.sleep(wrong)
        status = wrong if isinstance(wrong, int) else 200
        content, headers = fake.answer(path, body) if status == 200 else ("out of order", {})
        if wrong == "stale":
            headers[WEIGHT_VERSION] = "another:0"
        text = content if isinstance(content, str) else json.dumps(content)
        if isinstance(wrong, str) and wrong not in ("half", "stale"):
            text = wrong
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode()[: len(text) // 2] if wrong == "half" else text.encode())

    def log_message(self, *_: Any) -> None:
        pass
