"""Processes forked from one that has imported torch and the commands: a start takes a tenth of a second, not four.

Each is a process of its own in all that is tested with them: it is killed, signalled, limited and locked out by itself.
That a fresh interpreter does the same is seen by the tests that start one.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "dflash_offline.pipeline.app",
        "dflash_offline.stages.extract",
        "transformers.models.auto.modeling_auto",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


class Command:
    """A `dflash` command that runs beside the test."""

    def __init__(self, arguments: list[str], *, most_file_bytes: int | None = None) -> None:
        """`most_file_bytes` limits every file that it writes, as `ulimit -f` does."""
        number, self._stderr = tempfile.mkstemp()
        os.close(number)
        self.process: ForkServerProcess = FORKING.Process(
            target=_run, args=(arguments, self._stderr, most_file_bytes), daemon=False
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
    """Return the ids of the processes that a process started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    """Say whether a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def run(arguments: list[str], *, most_file_bytes: int | None = None) -> tuple[int, str]:
    """Run a command to its end; returns exit code and what it wrote to stderr."""
    return Command(arguments, most_file_bytes=most_file_bytes).wait()


def _run(arguments: list[str], stderr: str, most_file_bytes: int | None) -> None:
    from dflash_offline.pipeline.app import main

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
