"""Servers that answer without end, in bombs or not at all: what they cost is bounded, and no row is lost to them."""

import json
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from chat_server import ChatServer
from running import dflash, refused

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
Talk = Callable[[socket.socket], None]


def without_end(first: bytes, then: bytes, pause_s: float = 0.0) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(then)
            time.sleep(pause_s)

    return talk


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def of_length(body: bytes, headers: bytes = b"") -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    return talk


def gzip_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


HOSTILE: dict[str, Talk] = {
    "a body without end": without_end(CHUNKED + b"\r\n", chunk(b"a" * 65536)),
    "a body without end, in no chunks": without_end(HEAD + b"\r\n", b" " * 65536),
    "a chunk's length without end": without_end(CHUNKED + b"\r\n", b"0" * 4096),
    "an answer at a byte a tenth of a second": without_end(CHUNKED + b"\r\n", chunk(b"a"), 0.1),
    "a bomb": of_length(gzip_bomb(1 << 30), b"Content-Encoding: gzip\r\n"),
    "a bomb in a bomb": of_length(zlib.compress(gzip_bomb(1 << 26)), b"Content-Encoding: gzip, deflate\r\n"),
    "a header line without end": without_end(HEAD + b"X: ", b"a" * 4096),
    "headers without end": without_end(HEAD, b"X: a\r\n" * 1000),
    "a header at a byte a tenth of a second": without_end(HEAD + b"X: ", b"a", 0.1),
    "trailers without end": without_end(CHUNKED + b"\r\n0\r\n", b"X: a\r\n" * 1000),
    "provisional responses without end": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "many empty lists": of_length(b"[" + b"[]," * 480_000 + b"[]]"),
    "lists in lists": of_length(b"[" * 1_500_000),
    "a number of many digits": of_length(b"9" * 1_500_000),
    "nothing at all": lambda connection: time.sleep(60),
}


@contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """Serve every connection by a function that is given the socket, once a request came."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            talk(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def line(folder: Path, urls: list[str], num_rows: int) -> list[str]:
    rows = [{"messages": [{"role": "user", "content": f"row {index}"}]} for index in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    servers = [word for url in urls for word in ("--server", url)]
    quick = "--model m --timeout-s 1 --backoff-s 0.01 --rest-s 0.01 --rests 1 --server-tries 1 --row-tries 1000".split()
    return ["regenerate", str(folder / "rows.jsonl"), *servers, *quick, "--out", str(folder / "own.jsonl")]


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process held so far, as the kernel counts it; 0 once it has ended."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/status").read_text().splitlines():
            if entry.startswith("VmHWM:"):
                return int(entry.split()[1]) << 10
    return 0


def test_hostile_servers_cost_bounded_time_and_memory_and_no_row(tmp_path: Path) -> None:
    """Without them the command holds about 90 MiB."""
    with ExitStack() as stack:
        good = stack.enter_context(ChatServer(seconds=0.05))
        urls = [stack.enter_context(talking(talk)) for talk in HOSTILE.values()]
        command = [sys.executable, "-m", "dflash_offline.pipeline.app", *line(tmp_path, [*urls, good.url], 60)]
        began, peak = time.monotonic(), 0
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen([*command, "--rest-s", "60"], stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.01)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 60
    assert time.monotonic() - began < 30
    assert 60 << 20 < peak < 200 << 20


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a body without end", "more than 1,5"),
        ("a bomb", "the answer is compressed ('gzip'), which was not asked for"),
        ("a header line without end", "connection broken"),
        ("provisional responses without end", "no answer within 1 s"),
    ],
)
def test_a_hostile_server_alone_is_given_up_with_what_it_did(tmp_path: Path, name: str, said: str) -> None:
    with talking(HOSTILE[name]) as url:
        refused(dflash(*line(tmp_path, [url], 3)), "No server answers", said)
