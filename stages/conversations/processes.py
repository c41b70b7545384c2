"""Batches of rows worked on in processes of their own, their outcomes in the order of the batches.

Small data never gets that far: a process takes a second to start, so this one goes on alone until others are ready.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.conversations.files import RawRow
from dflash_offline.stages.conversations.tokenize import BatchOutcome, RowWorker, Unread, unread

ALONE_BYTES = 2 << 20
"""Of content, before other processes are started: some seconds of work."""
_AHEAD = 2
"""Batches for each process that are under way or wait for an earlier one."""
_COMMAND = "from dflash_offline.stages.conversations.processes import serve; serve()"
_Answered = tuple[list[RawRow], BatchOutcome]


def outcomes(
    batches: Iterator[list[RawRow]], worker: RowWorker, num_processes: int
) -> Generator[_Answered, None, None]:
    """Yield each batch and what became of it, in order; the same whatever the number of processes.

    Close the iterator to end them. Raises `DflashError` if one of them is killed.
    """
    if num_processes == 1 or not worker.masker.tokenizer.portable:
        yield from ((batch, worker(unread(batch))) for batch in batches)
        return
    size = 0
    for batch in batches:
        yield batch, worker(unread(batch))
        size += sum(len(row.content) for row in batch)
        if size >= ALONE_BYTES:
            break
    else:
        return
    yield from _shared(batches, worker, num_processes)


def _shared(batches: Iterator[list[RawRow]], worker: RowWorker, num_processes: int) -> Iterator[_Answered]:
    """Yield the outcomes of the batches left, by processes as soon as they are ready."""
    helpers: list[_Helper] = []
    ready: SimpleQueue[_Helper] = SimpleQueue()

    def prepare(helper: _Helper, work: bytes) -> None:
        try:
            helper.ask(work)
        finally:  # one that could not start says so again to the first batch that it gets
            ready.put(helper)

    def answer(batch: list[Unread]) -> BatchOutcome:
        helper = ready.get()
        try:
            return helper.ask(pickle.dumps(batch))
        finally:
            ready.put(helper)

    # A thread for each: it waits for its process, first to start, then for a batch at a time.
    with ThreadPoolExecutor(num_processes, thread_name_prefix="rows") as threads:
        try:
            helpers += (_Helper() for _ in range(num_processes))
            work = pickle.dumps(worker)
            starting = [threads.submit(prepare, helper, work) for helper in helpers]
            for batch in batches:
                if any(start.done() for start in starting):
                    batches = chain([batch], batches)
                    break
                yield batch, worker(unread(batch))
            pending: deque[tuple[list[RawRow], Future[BatchOutcome]]] = deque()
            for batch in batches:
                pending.append((batch, threads.submit(answer, unread(batch))))
                if len(pending) > _AHEAD * num_processes:
                    batch, future = pending.popleft()
                    yield batch, future.result()
            for batch, future in pending:
                yield batch, future.result()
        finally:
            for helper in helpers:
                helper.kill()
            threads.shutdown(cancel_futures=True)
            for helper in helpers:
                helper.connection.close()


class _Helper:
    """A process that answers a question at a time."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        # A pool of one thread: as many threads as processes are enough, and none at all encodes a tenth slower.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
        # In a session of its own, so that Ctrl-C in a terminal reaches the command alone, which then ends it.
        command = [sys.executable, "-P", "-c", _COMMAND, str(other.fileno())]
        with other:
            self.process = subprocess.Popen(
                command, pass_fds=[other.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def ask(self, question: bytes) -> Any:
        """Return the answer; `DflashError` if the process ended instead."""
        try:
            self.connection.send_bytes(question)
            failed, answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise DflashError(_ended(self.process.wait())) from error
        if failed:
            raise RuntimeError(f"A process that tokenizes failed:\n{answer}")
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def _ended(code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (
        f"A process that tokenizes {how}. If the machine ran out of memory, free some or take fewer cores (taskset), "
        f"and repeat the command."
    )


def serve() -> None:
    """Answer batches on the connection whose number the command line gives, until it is closed: first comes the
    worker to answer with. Runs in a process of its own, which ends when the one that asks does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:
        worker: RowWorker = pickle.loads(connection.recv_bytes())
        connection.send_bytes(pickle.dumps((False, None)))
        gc.freeze()  # what is loaded stays
        while True:
            batch = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((False, worker(batch)))
            except Exception:
                answer = pickle.dumps((True, traceback.format_exc()))
            connection.send_bytes(answer)
