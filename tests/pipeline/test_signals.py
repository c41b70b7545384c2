"""Signals that ask a command to stop, from its first moment on: in a word, with the signal's exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.stop import STOPS, Stopped, left_to_this_process, stops_raised


def start(*arguments: object) -> "subprocess.Popen[str]":
    """Start a command in a fresh interpreter, in which no signal is ignored."""

    def prepare() -> None:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)

    line = [sys.executable, "-m", "dflash_offline.pipeline", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)


def is_caught(process: "subprocess.Popen[str]", number: signal.Signals) -> bool:
    """Say whether a process handles a signal itself."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", STOPS)
def test_while_the_commands_are_loaded_a_signal_ends_the_program_in_a_word(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start("inspect", tmp_path)
    while not is_caught(process, signal.SIGHUP):
        assert process.poll() is None
    process.send_signal(number)
    printed, said = process.communicate(timeout=30)
    assert (process.returncode, printed, said) == (128 + number, "", "dflash: Stopped.\n")


@pytest.mark.parametrize("number", STOPS)
def test_a_command_ends_with_the_signals_code_and_a_word(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in STOPS]
    with pytest.raises(typer.Exit) as ended, reported("Repeat."):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.exit_code == 128 + number
    assert capsys.readouterr().err == "dflash: Stopped. Repeat.\n"
    assert [signal.getsignal(each) for each in STOPS] == before


def test_what_is_ignored_stays_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with reported("Repeat."):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == ""


WAITING = """
import sys, time, typer
from pathlib import Path
from dflash_offline.pipeline.command import reported
try:
    with reported("Repeat.") as progress:
        try:
            progress.start("Waiting", 10, "rows")
            Path(sys.argv[1]).touch()
            time.sleep(60)
        finally:
            progress.say("kept")
            Path(sys.argv[2]).touch()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


def test_a_closed_terminal_keeps_no_command_from_ending_in_order(tmp_path: Path) -> None:
    """What it says after its terminal is gone would raise, and what is kept would not be kept."""
    primary, terminal = os.openpty()
    ready, kept = tmp_path / "ready", tmp_path / "kept"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(ready), str(kept)],
        stdout=terminal,
        stderr=terminal,
        stdin=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    while not ready.exists() and process.poll() is None:
        time.sleep(0.01)
    os.close(primary)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 128 + signal.SIGHUP and kept.exists()


def test_processes_that_are_started_leave_the_signals_to_the_one_that_started_them() -> None:
    """A scheduler may signal all processes of a job at once."""
    with left_to_this_process():
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=-1
        )
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    for number in STOPS:
        child.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.kill()
    child.wait()
    child.stdout.close()
    with pytest.raises(Stopped), stops_raised():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


class Stopping:
    """Sends a signal as it is destroyed, where what a handler raises is lost."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def ends_in(error: BaseException) -> None:
    """Answer a signal by another error, as the cleanup of a library may."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except KeyboardInterrupt:
        raise error from None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("work", "more"),
    [
        (Stopping, ""),
        (lambda: ends_in(RuntimeError("shut down")), "\nIt ended in an error meanwhile: RuntimeError('shut down')"),
        (lambda: ends_in(DflashError("No room.")), "\nIt ended in an error meanwhile: No room."),
        (lambda: ends_in(typer.Exit(1)), ""),
        (lambda: ends_in(BaseExceptionGroup("", [KeyboardInterrupt()])), ""),
    ],
    ids=["destructor", "bug", "error", "exit", "group"],
)
def test_a_signal_is_the_end_whatever_becomes_of_what_it_raised(
    work: Callable[[], object], more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in STOPS]
    with pytest.raises(typer.Exit) as ended, reported("Repeat."):
        work()
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith(f"dflash: Stopped. Repeat.{more}\n")
    assert [signal.getsignal(each) for each in STOPS] == before


def test_a_signal_that_came_just_before_processes_are_started_leaves_the_signals_open() -> None:
    mask = signal.pthread_sigmask
    with pytest.raises(Stopped), stops_raised(), pytest.MonkeyPatch.context() as patched:
        came = iter([False, True])

        def block(how: int, numbers: Iterable[int]) -> object:
            before = mask(how, numbers)
            if next(came, False):
                raise Stopped(signal.SIGTERM)
            return before

        patched.setattr(signal, "pthread_sigmask", block)
        with left_to_this_process():
            pass
    assert not mask(signal.SIG_BLOCK, []) & set(STOPS)
