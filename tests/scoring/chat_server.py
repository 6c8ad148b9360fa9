"""A local OpenAI-compatible server whose faults a test scripts, and which counts what it was asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """`answer(text, tries)` says what comes back: reply text, a status, a body as bytes, or seconds of silence."""

    def __init__(self, answer: Callable[[str, int], str | int | bytes | float | tuple]):
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a killed client leaves half requests behind
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = request["messages"][0]["content"]
                text = content if isinstance(content, str) else content[-1]["text"]
                with outer._lock:
                    outer.asked[text] += 1
                    outer.requests.append(request)
                    outer.keys.append(self.headers["Authorization"])
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                    tries = outer.asked[text]
                try:
                    self._send(outer.answer(text, tries), text)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer._lock:
                        outer.in_flight -= 1

            def _send(self, reply, text):
                headers = {}
                if isinstance(reply, tuple):
                    reply, headers = reply
                if isinstance(reply, float):
                    time.sleep(reply)
                    reply = "Score: 1"
                status = reply if isinstance(reply, int) else 200
                if isinstance(reply, str):
                    body = json.dumps(
                        {
                            "id": "x", "object": "chat.completion", "created": 0, "model": "judge",
                            "choices": [{"index": 0, "finish_reason": "stop",
                                         "message": {"role": "assistant", "content": reply}}],
                        }
                    ).encode()  # fmt: skip
                    with outer._lock:
                        outer.answered[text] += 1
                else:
                    body = reply if isinstance(reply, bytes) else b'{"error": {"message": "no"}}'
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

        return Handler


@contextmanager
def chat_server(answer) -> Iterator[ChatServer]:
    server = ChatServer(answer)
    try:
        yield server
    finally:
        server.close()
