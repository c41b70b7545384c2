"""Parquet and Arrow files, read by a process of its own: a file that makes the library crash or swell ends only that.

One process reads all files, some rows of one at a time, from the first such file until this process ends.
"""

import atexit
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Lock
from typing import Any

from dflash_offline.stages.conversations.reading import bounds
from dflash_offline.stages.conversations.reading.streams import STREAM_FAULTS, NumberedRows, first_line
from dflash_offline.stages.stop import left_to_this_process

_COMMAND = "from dflash_offline.stages.conversations.reading.apart import serve; serve()"
_ANSWER_BYTES = 1 << 20
_ANSWER_ROWS = 256
_THREADS = 4


def read_apart(container: str, path: Path) -> NumberedRows:
    """Yield the rows of a Parquet or Arrow file; `OSError` if it is damaged or more than the bounds allow."""
    reader = next(_READERS)
    rows = _ask(("open", reader, container, path))
    try:
        while rows:
            yield from rows
            rows = _ask(("next", reader))
    finally:
        if rows and _process is not None:
            _ask(("close", reader))


def num_arrow_rows(path: Path) -> int:
    """Return how many rows an Arrow file or stream holds; `OSError` as from `read_apart`."""
    ((number, _, _),) = read_apart("rows of arrow", path)
    return number


class _Process:
    """The process that reads."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        command = [sys.executable, "-P", "-c", _COMMAND, str(other.fileno())]
        # What a library says as it crashes is of no use.
        with other, left_to_this_process():
            self.process = subprocess.Popen(
                command,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, question: Any) -> Any:
        try:
            self.connection.send_bytes(pickle.dumps(question))
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise OSError(f"the process that reads it {how}: it is damaged, or {bounds.TOO_MUCH_MEMORY}") from error

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_READERS = count()
_LOCK = Lock()
_process: _Process | None = None


def _ask(question: Any) -> Any:
    global _process
    with _LOCK:
        if _process is None:
            _process = _Process()
            atexit.register(_process.end)
        try:
            failed, answer = _process.ask(question)
        except OSError:
            _process.end()
            _process = None
            raise
    if failed:
        raise OSError(answer)
    return answer


def serve() -> None:
    """Answer with rows on the connection whose number the command line gives, until it is closed."""
    import pyarrow as pa

    from dflash_offline.stages.conversations.reading.arrow import count_arrow, read_arrow, read_parquet

    read = {"parquet": read_parquet, "arrow": read_arrow, "rows of arrow": count_arrow}
    pa.set_cpu_count(min(pa.cpu_count(), _THREADS))
    bounds.bound_memory()
    opened: dict[int, Iterator[list[tuple[int, bytes, str]]]] = {}
    with suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:
        while True:
            what, reader, *file = pickle.loads(connection.recv_bytes())
            try:
                if what == "open":
                    container, path = file
                    opened[reader] = _grouped(read[container](path))
                if what == "close":
                    opened[reader] = iter(())
                answer: tuple[bool, Any] = False, next(opened[reader], None)
            except MemoryError:
                answer = (True, f"what follows {bounds.TOO_MUCH_MEMORY}")
            except (*STREAM_FAULTS, ValueError, RecursionError) as error:
                answer = (True, first_line(error))
            connection.send_bytes(pickle.dumps(answer))


def _grouped(rows: NumberedRows) -> Iterator[list[tuple[int, bytes, str]]]:
    """Yield the rows some at a time, as many as are worth an answer; those before an error first, then raise it."""
    group, size = [], 0
    failed: Exception | None = None
    try:
        for row in rows:
            group.append(row)
            size += len(row[1])
            if size > _ANSWER_BYTES or len(group) == _ANSWER_ROWS:
                yield group
                group, size = [], 0
    except Exception as error:
        failed = error
    if group:
        yield group
    if failed is not None:
        raise failed
