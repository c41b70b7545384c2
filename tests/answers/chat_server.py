"""A real HTTP server on loopback that speaks /v1/chat/completions, and misbehaves where it is told to.

What it answers is a function of the conversation alone, so that an answer in a wrong place shows.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Fault = Callable[[str, int], str | None]
"""From the last user turn and the number of earlier requests for the same conversation to a fault's name."""


def answer_to(messages: list[dict[str, Any]]) -> str:
    """Return what the server says to a conversation."""
    said = json.dumps([[message["role"], message["content"]] for message in messages])
    return f"answer {hashlib.sha256(said.encode()).hexdigest()[:8]} to {messages[-1]['content']}"


NONSENSE: dict[str, bytes] = {
    "nonsense": b"<html>gateway</html>",
    "nothing": b"",
    "half": b'{"choices": [{"message": {"content": "a',
    "list": b"[1, 2]",
    "no choices": b'{"choices": []}',
    "null choice": b'{"choices": [null]}',
    "null message": b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
    "number": b'{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}',
    "no finish": b'{"choices": [{"message": {"content": "a"}, "finish_reason": null}]}',
    "surrogate": b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
    "deep": b"[" * 100_000,
}


class ChatServer:
    """Serves in a thread until it is left; `fault` says when and how it misbehaves."""

    def __init__(self, fault: Fault = lambda _said, _tries: None, *, seconds: float = 0.0) -> None:
        self.fault = fault
        self.seconds = seconds
        """Of each answer."""
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.probes = 0
        """Requests of one token, which ask whether it is there; they are not among the others."""
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self.faults: Counter[str] = Counter()
        self._at_once = 0
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with server._lock:
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    server._respond(self)
                finally:
                    with server._lock:
                        server._at_once -= 1

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # clients are killed in mid-request

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "ChatServer":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Go away for good: connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        messages = request["messages"]
        with self._lock:
            key = json.dumps(messages)
            tries = self._tries[key]
            self._tries[key] += 1
            if request["max_tokens"] == 1:
                self.probes += 1
            else:
                self.requests.append({"path": handler.path, **request})
                self.times.append(time.monotonic())
            self.keys.add(handler.headers["Authorization"])
            fault = self.fault(messages[-1]["content"], tries)
            self.faults[fault or "none"] += 1
        time.sleep(self.seconds)
        status, body, headers = self._response(fault, messages)
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        cut = fault == "cut"
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True

    def _response(self, fault: str | None, messages: list[dict[str, Any]]) -> tuple[int, bytes, dict[str, str]]:
        if fault == "slow":
            time.sleep(0.7)
        if fault in NONSENSE:
            return 200, NONSENSE[fault], {}
        if fault and fault.isdecimal():
            error = {"error": {"message": f"told to say {fault}"}}
            return int(fault), json.dumps(error).encode(), {"Retry-After": "0.05"} if fault == "429" else {}
        message: dict[str, Any] = {"role": "assistant", "content": answer_to(messages)}
        finish = "stop"
        if fault == "length":
            finish = "length"
        elif fault == "empty":
            message["content"] = " \n"
        elif fault == "tool":
            message, finish = {"role": "assistant", "content": None, "tool_calls": [{}]}, "tool_calls"
        elif fault == "reasoning":
            message["reasoning_content"] = "because"
        elif fault == "filter":
            finish = "content_filter"
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode(), {}
