"""A real HTTP server on loopback that streams answers in rounds, as one with a draft does, and counts them itself."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

K = 7
"""Tokens that it drafts in a round."""


@dataclass(frozen=True)
class Decoded:
    """An answer as tokens, those of the prompt's forward and then of each round, and how it came about."""

    rounds: list[list[int]]
    accepted: list[int]
    """Drafted tokens that each round took, those behind the answer's end included."""
    prompt_ids: list[int]


def answer_to(said: str) -> list[list[int]]:
    """Return the answer to a prompt as tokens, those of the prompt's forward and then of each round."""
    digest = hashlib.sha256(said.encode()).digest()
    sizes = [1, *(1 + byte % (K + 1) for byte in digest[:6])]
    tokens = iter(digest[7:] * 4)
    return [[next(tokens) for _ in range(size)] for size in sizes]


class LiveServer:
    """Serves in a thread until it is left; `kind` decides what it shows of itself, `fault` how it misbehaves."""

    def __init__(
        self,
        kind: str = "vllm",
        fault: str = "",
        *,
        tells_rounds: bool = False,
        wrong: str = "",
        decode: Callable[[dict[str, Any]], Decoded] | None = None,
        num_drafted: int = K,
    ) -> None:
        """`decode` answers a request, by default with tokens of no meaning; `num_drafted` are drafted in a round."""
        self.kind, self.fault, self.tells_rounds, self.wrong = kind, fault, tells_rounds, wrong
        self.decode, self.num_drafted = decode, num_drafted
        self.counts: Counter[str] = Counter()
        self.by_slot = [0] * num_drafted
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                server._show(self)

            def do_POST(self) -> None:
                with server._lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    server._answer(self)
                finally:
                    with server._lock:
                        server.at_once -= 1

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "LiveServer":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _show(self, handler: BaseHTTPRequestHandler) -> None:
        length = 1 + self.counts["accepted"] / max(self.counts["drafts"], 1)
        state = {"avg_spec_accept_length": length, "last_gen_throughput": 1.0}
        shown = {"/v1/models": json.dumps({"data": [{"id": "the-model"}]})}
        if self.kind == "sglang":
            shown["/server_info"] = json.dumps(
                {"internal_states": [state], "speculative_num_draft_tokens": self.num_drafted + 1}
            )
        if self.kind == "vllm":
            shown["/metrics"] = self._metrics()
        text = shown.get(handler.path)
        handler.send_response(200 if text is not None else 404)
        handler.end_headers()
        handler.wfile.write((text or "").encode())

    def _metrics(self) -> str:
        label = '{engine="0",model_name="the, model"}'
        counts = self.counts
        if self.fault == "restart" and len(self.requests) > 3:
            counts = Counter()
        lines = [
            "# TYPE vllm:request_success_total counter",
            f'vllm:request_success_total{{engine="0",finished_reason="stop"}} {float(counts["requests"])}',
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {float(counts["other requests"])}',
            f"vllm:generation_tokens_total{label} {float(counts['tokens'])}",
            f"vllm:num_requests_running{label} 0.0",
        ]
        if self.fault != "no draft":
            for name, key in (("drafts", "drafts"), ("draft_tokens", "drafted"), ("accepted_tokens", "accepted")):
                lines.append(f"vllm:spec_decode_num_{name}_total{label} {float(counts[key])}")
            for slot, number in enumerate(self.by_slot):
                labels = f'{{engine="0",position="{slot}"}}'
                lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{labels} {float(number)}")
        return "\n".join(lines) + "\n"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        said = request.get("prompt") or request["messages"][-1]["content"]
        if self.fault == "strict" and "return_token_ids" in request:
            handler.send_response(400)
            handler.end_headers()
            handler.wfile.write(b'{"error": {"message": "Unknown field: return_token_ids"}}')
            return
        decoded = self.decode(request) if self.decode else None
        rounds = decoded.rounds if decoded else answer_to(str(said))
        if self.wrong and self.wrong in str(said):
            rounds[-1][-1] += 1
        accepted = decoded.accepted if decoded else [len(tokens) - 1 for tokens in rounds[1:]]
        with self._lock:
            self.requests.append({"path": handler.path, **request})
            other = self.fault == "others" and len(self.requests) == 3
            self.counts += Counter(requests=1, tokens=sum(map(len, rounds)), drafts=len(accepted))
            self.counts += Counter(drafted=self.num_drafted * len(accepted), accepted=sum(accepted))
            self.counts += Counter({"other requests": 2, "tokens": 50}) if other else Counter()
            for number in accepted:
                for slot in range(number):
                    self.by_slot[slot] += 1
        handler.send_response(200)
        handler.end_headers()
        for event in self._events(request, rounds, accepted, decoded.prompt_ids if decoded else None):
            handler.wfile.write(event)
            handler.wfile.flush()
            time.sleep(0.002)

    def _events(
        self, request: dict[str, Any], rounds: list[list[int]], accepted: list[int], prompt_ids: list[int] | None
    ) -> list[bytes]:
        key = "delta" if "messages" in request else None
        chunks = []
        for tokens in rounds:
            text = "".join(f"{token} " for token in tokens)
            choice: dict[str, Any] = {key: {"content": text}} if key else {"text": text}
            if request.get("return_token_ids"):
                choice["token_ids"] = tokens
            chunks.append({"choices": [choice]})
        if prompt_ids is not None:
            chunks[0]["prompt_token_ids"] = prompt_ids
        usage: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": sum(map(len, rounds))}}
        if self.tells_rounds:
            told = {"per_step_drafted": [self.num_drafted] * len(accepted), "per_step_accepted": accepted}
            usage["metrics"] = {"speculative_decoding": told}
        lines = [f"data: {json.dumps(event)}\n\n".encode() for event in (*chunks, usage)] + [b"data: [DONE]\n\n"]
        planted = {
            "error": [*lines[:2], b'data: {"error": {"message": "out of memory"}}\n\n'],
            "cut": lines[:-2],
            "nonsense": [b"data: <html>\n\n"],
            "huge": [b"data: " + b"1" * (1 << 20)] * 40,
        }
        return planted.get(self.fault, lines) if len(self.requests) > 1 else lines
