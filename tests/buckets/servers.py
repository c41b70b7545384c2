"""A real server of the S3 protocol, and one between it and its clients that refuses and cuts what it is asked."""

import http.client
import os
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

KEY, SECRET = "AKIAPLANTEDKEYID", "planted+secret/access-key"


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


@contextmanager
def moto_server(log: Path) -> Iterator[int]:
    """Run moto's server in the environment of its own that DFLASH_MOTO names; yields its port."""
    port = free_port()
    command = [str(Path(os.environ["DFLASH_MOTO"]) / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int, name: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")).close()


def environment(port: int) -> dict[str, str]:
    """Return what the environment of a client of a server on this port has to hold."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }


Answer = tuple[int, str] | None
"""Status and code of the error that is sent instead of an answer; status 0 cuts the connection, after the request has
been carried out if there is a code. None passes the request on."""


@contextmanager
def troubled_server(port: int | None, trouble: Callable[[str, str], Answer]) -> Iterator[int]:
    """Pass requests on to a server, but for those that `trouble`, given method and path, answers; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._body()
            answer = trouble(self.command, self.path)
            if answer and answer[0]:
                status, code = answer
                said = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>It is planted. {KEY}</Message></Error>"
                self._send(status, [], said.encode())
                return
            if answer and not answer[1]:
                self.connection.close()
                self.close_connection = True
                return
            assert port is not None
            onward = http.client.HTTPConnection("127.0.0.1", port)
            headers = {n: v for n, v in self.headers.items() if n.lower() not in ("transfer-encoding", "expect")}
            onward.request(self.command, self.path, body, headers)
            got = onward.getresponse()
            content = got.read()
            if answer:
                self.connection.close()
                self.close_connection = True
                return
            self._send(got.status, got.getheaders(), content)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            dropped = ("transfer-encoding", "content-length", "connection")
            for name, value in headers:
                if name.lower() not in dropped:
                    self.send_header(name, value)
            length = {n.lower(): v for n, v in headers}.get("content-length") if self.command == "HEAD" else None
            self.send_header("content-length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_args: object) -> None:
            """Clients that were killed cut their connections."""

    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def now_and_then(share: float, answers: list[Answer], seed: int = 0) -> Callable[[str, str], Answer]:
    """Return trouble with a share of all requests."""
    chance = random.Random(seed)
    return lambda _method, _path: chance.choice(answers) if chance.random() < share else None
