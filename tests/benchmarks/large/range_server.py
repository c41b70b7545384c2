"""A server of the S3 protocol over a folder, for readers: a request waits, and all together have one rate of bytes.

`python tests/benchmarks/large/range_server.py FOLDER [BYTES_A_SECOND SECONDS_A_REQUEST]` prints its port. The bucket is
the folder; it answers GET with and without a range, HEAD, and lists of the second version.
"""

import bisect
import os
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from xml.sax.saxutils import escape

RATE, DELAY_S = 200e6, 0.03
_PIECE = 1 << 18
_PAGE = 1000


class Throttle:
    """Gives out bytes at one rate to all that ask, in the order in which they ask."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at, self._lock = rate, 0.0, threading.Lock()

    def wait(self, count: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - 0.01) + count / self._rate
            until = self._free_at
        if (left := until - time.monotonic()) > 0:
            time.sleep(left)


class Folder:
    """What the server has: by name the path, size and tag of each object."""

    def __init__(self, root: Path) -> None:
        self.names: list[str] = []
        self.root = str(root)
        for folder, _, files in os.walk(root):
            inner = os.path.relpath(folder, root)
            self.names += [name if inner == "." else f"{inner}/{name}" for name in files]
        self.names.sort()

    def status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(f"{self.root}/{name}")  # noqa: PTH116 - a Path for each of 200,000 takes longer
        except OSError:
            return None

    def page(self, prefix: str, after: str) -> tuple[list[str], bool]:
        """Return up to a thousand names that begin with `prefix` and come after `after`, and whether there are more."""
        first = bisect.bisect_right(self.names, after) if after >= prefix else bisect.bisect_left(self.names, prefix)
        found = []
        for name in self.names[first : first + _PAGE + 1]:
            if not name.startswith(prefix):
                break
            found.append(name)
        return found[:_PAGE], len(found) > _PAGE


def handler(folder: Folder, throttle: Throttle, delay_s: float) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(delay_s)
            path, _, query = self.path.partition("?")
            name = urllib.parse.unquote(path).lstrip("/").partition("/")[2]
            asked = dict(urllib.parse.parse_qsl(query))
            if "list-type" in asked:
                self._list(asked)
                return
            status = folder.status(name)
            if status is None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                return
            begin, end, code = 0, status.st_size, 200
            if wanted := self.headers.get("range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end, code = int(first), min(int(last or end) + 1, end), 206
                if begin >= status.st_size:
                    self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
                    return
            self.send_response_only(code)
            self._describe(status)
            self.send_header("content-length", str(end - begin))
            if code == 206:
                self.send_header("content-range", f"bytes {begin}-{end - 1}/{status.st_size}")
            self.end_headers()
            self.wfile.flush()
            if self.command == "HEAD":
                return
            with Path(folder.root, name).open("rb") as file:
                while begin < end:
                    throttle.wait(count := min(_PIECE, end - begin))
                    begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, count)

        do_HEAD = do_GET

        def _describe(self, status: os.stat_result) -> None:
            self.send_header("etag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
            self.send_header("last-modified", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(status.st_mtime)))

        def _list(self, asked: dict[str, str]) -> None:
            after = asked.get("continuation-token") or asked.get("start-after") or ""
            bucket_prefix = asked.get("prefix", "")
            names, more = folder.page(bucket_prefix, after)
            rows = []
            for name in names:
                status = folder.status(name)
                if status is not None:
                    when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
                    rows.append(
                        f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified>"
                        f"<ETag>&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;</ETag><Size>{status.st_size}</Size>"
                        f"<StorageClass>STANDARD</StorageClass></Contents>"
                    )
            token = f"<NextContinuationToken>{escape(names[-1])}</NextContinuationToken>" if more else ""
            self._answer(
                200,
                f'<?xml version="1.0"?><ListBucketResult><KeyCount>{len(rows)}</KeyCount><MaxKeys>{_PAGE}</MaxKeys>'
                f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{''.join(rows)}"
                f"</ListBucketResult>".encode(),
            )

        def _answer(self, code: int, content: bytes) -> None:
            self.send_response_only(code)
            self.send_header("content-type", "application/xml")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                throttle.wait(len(content))
                self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_arguments: object) -> None:
        """Clients cut their connections as they end."""


@contextmanager
def serving(folder: Path, rate: float = RATE, delay_s: float = DELAY_S) -> Iterator[dict[str, str]]:
    """Serve a folder from a process of its own; yields what the environment of its clients has to hold."""
    with Popen([sys.executable, __file__, str(folder), str(rate), str(delay_s)], stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield {
                "AWS_ACCESS_KEY_ID": "reader",
                "AWS_SECRET_ACCESS_KEY": "reader",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_SKIP_SIGNATURE": "true",
            }
        finally:
            process.kill()


def main() -> None:
    root = Path(sys.argv[1])
    rate, delay_s = (
        (float(text) for text in (*sys.argv[2:4], RATE, DELAY_S)[:2]) if len(sys.argv) > 3 else (RATE, DELAY_S)
    )
    server = Server(("127.0.0.1", 0), handler(Folder(root), Throttle(rate), delay_s))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
