"""Processes forked from one that has imported torch and the commands: a start takes a tenth of a second, not four.

Each is a process of its own in all that is tested with them: it is killed, signalled, limited and locked out by itself.
That a fresh interpreter does the same is seen by the tests that start one.
"""

import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "dflash_offline.pipeline.app",
        "dflash_offline.stages.extract",
        "transformers.models.auto.modeling_auto",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


def forked(_method: str) -> ForkServerContext:
    """Return the context of these in place of a command's own, its server started.

    A command holds signals back while it starts workers, and the server would for all that it starts from then on.
    """
    forkserver.ensure_running()
    return FORKING


class Command:
    """A `dflash` command that runs beside the test."""

    def __init__(
        self, arguments: list[str], *, most_file_bytes: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """`most_file_bytes` limits every file that it writes, as `ulimit -f` does; `environment` adds to its own."""
        number, self._stderr = tempfile.mkstemp()
        os.close(number)
        self.process: ForkServerProcess = FORKING.Process(
            target=_run, args=(arguments, self._stderr, most_file_bytes, environment or {}), daemon=False
        )
        self.process.start()

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal, or None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 120) -> tuple[int, str]:
        """Wait for its end; returns exit code and what it wrote to stderr."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        assert code is not None, "the command does not end"
        said = Path(self._stderr).read_text()
        Path(self._stderr).unlink()
        return code, said


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process started; threads that end meanwhile are passed over."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):
            found += map(int, (task / "children").read_text().split())
    return found


def is_running(pid: int) -> bool:
    """Say whether a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def run(arguments: list[str], *, most_file_bytes: int | None = None) -> tuple[int, str]:
    """Run a command to its end; returns exit code and what it wrote to stderr."""
    return Command(arguments, most_file_bytes=most_file_bytes).wait()


def agents_store() -> TCPStore:
    """Return what torchrun keeps for the ranks that it starts, as long as it is held."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_environments(count: int, store: TCPStore) -> list[dict[str, str]]:
    """Return what torchrun would set for each of some ranks that train together on this machine."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def as_ranks(count: int, work: Callable[..., Any], *arguments: Any, store: TCPStore | None = None) -> list[Any]:
    """Return what a function, called with the same arguments by each of some ranks, returned to each.

    They meet by a store of their own unless given that of ranks before them, which torchrun keeps for the next ones.
    """
    store, pipes = store or agents_store(), [FORKING.Pipe(duplex=False) for _ in range(count)]
    processes = [
        FORKING.Process(target=_as_rank, args=(environment, end, work, arguments), daemon=True)
        for environment, (_, end) in zip(rank_environments(count, store), pipes, strict=True)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()  # so that a process which dies ends the wait for it
    try:
        assert all(answers.poll(600) for answers, _ in pipes), "a rank does not answer"
        found = [answers.recv() for answers, _ in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    return found


def _as_rank(environment: dict[str, str], answers: Connection, work: Callable[..., Any], arguments: Any) -> None:
    _begin(environment)
    answers.send(work(*arguments))


def _begin(environment: dict[str, str]) -> None:
    """Make a forked process as a test session is: what is imported is no garbage, and no file is synced."""
    os.environ.update(environment)
    gc.freeze()
    leave_syncing_out()


def leave_syncing_out() -> None:
    """Have this process sync no file: what it takes is the disk's, and no test cuts the power."""
    os.fsync = os.fdatasync = lambda _file: None  # type: ignore[assignment]


def _run(arguments: list[str], stderr: str, most_file_bytes: int | None, environment: dict[str, str]) -> None:
    from dflash_offline.pipeline.app import main

    _begin(environment)
    for stream, path in ((1, os.devnull), (2, stderr)):
        opened = os.open(path, os.O_WRONLY)
        os.dup2(opened, stream)
        os.close(opened)
    if most_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, most_file_bytes))
    sys.argv = ["dflash", *arguments]
    main()


_HOLD = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which must be a regular one, in a process that knows nothing of this project."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield
