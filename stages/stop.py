"""Signals that ask a command to stop: Ctrl-C, a scheduler's SIGTERM, and the SIGHUP of a terminal that is closed."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
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
def handled(handler: Callable[[int, object], None]) -> Iterator[Callable[[], None]]:
    """Have these signals call the handler within; yields what ends that sooner.

    In another thread than the main one, where no signal arrives, nothing changes.
    """
    before = {number: signal.getsignal(number) for number in stop_signals()} if _is_main_thread() else {}

    def restore() -> None:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)

    try:
        for number in before:
            signal.signal(number, handler)
        yield restore
    finally:
        restore()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stops_raised() -> Iterator[None]:
    """Raise `Stopped` in the main thread when such a signal comes, and at the end if it has not ended the work.

    What is raised amid a destructor is lost, and amid a cleanup it may become another error: that is its cause then.
    """
    came: list[int] = []
    is_over = False

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        if not is_over:  # else it is raised below, once the handlers from before are back
            leave_lost_terminal()
            raise Stopped(number)

    try:
        with handled(stop):
            try:
                yield
            finally:
                is_over = True
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if came:
            raise Stopped(came[0]) from error
        raise
    if came:
        raise Stopped(came[0])


@contextmanager
def stops_noted(then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Append the first such signal to the list, for work that nothing may be raised amid, and call `then`.

    A second one acts at once.
    """
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(number)
        leave_lost_terminal()
        restore()
        then()

    with handled(note) as restore:
        yield noted


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # raises what came before
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
