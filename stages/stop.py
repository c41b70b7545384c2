"""Signals that ask a command to stop: Ctrl-C, a scheduler's SIGTERM, and the SIGHUP of a terminal that is closed."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked for an end, and is handled as Ctrl-C is. The message, if any, says what was kept."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(*[message] if message else [])
        self.number = number


def stop_signals() -> list[int]:
    """Return the numbers of these signals but those that are ignored, as `nohup` has SIGHUP ignored."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


def signal_of(error: KeyboardInterrupt) -> int:
    """Return the number of the signal that an interrupt stands for."""
    return error.number if isinstance(error, Stopped) else int(signal.SIGINT)


@contextmanager
def stops_raised() -> Iterator[None]:
    """Raise `Stopped` in the main thread when such a signal comes; Ctrl-C stays Python's own KeyboardInterrupt.

    In another thread, where no signal arrives, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _frame: object) -> None:
    leave_lost_terminal()
    raise Stopped(number)


def leave_lost_terminal() -> None:
    """Let what is still said go nowhere where the terminal is gone: each write to it would be an error."""
    for descriptor in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        except OSError:  # closed before
            continue


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Processes that are started within never get these signals: this one does, and ends them.

    Otherwise a Ctrl-C in a terminal, or a scheduler that signals all processes of a job, would end them first, each
    with an error of its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
