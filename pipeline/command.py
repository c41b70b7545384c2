"""What every command does around its work: progress, a user's errors reported in one message, and the exit code."""

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from dflash_offline.pipeline.progress import EventProgress, LogFormat, is_live, open_progress
from dflash_offline.schemas.errors import DflashError, missing_memory
from dflash_offline.stages.buckets.mirror import with_urls
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.stop import signal_of, stops_raised

_ADVICE = {
    errno.EMFILE: "Let a process have more files open: `ulimit -n` shows how many, and `ulimit -n 4096` sets it. ",
    errno.ENFILE: "All programs of this machine together have too many files open: end some of them. ",
    errno.EFBIG: "Let files become larger: `ulimit -f` shows how large, unless their disk sets the limit. ",
    errno.ESTALE: "The file was removed or replaced on another machine, or its server was restarted: see which. ",
}
_OUTSIDE_FAULTS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ENAMETOOLONG ELOOP".split()
} | _ADVICE.keys()
"""System errors that are no bug of this program: no room, no permission, a broken disk, an impossible name, and those
whose own text does not say what to do."""
_NO_THREAD = ("can't start new thread", "pthread_create", "ThreadPoolBuildError", "esource temporarily unavailable")
_NO_FILE = "Too many open files"
_LIBRARY_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Variables that keep libraries which are loaded from now on from drawing bars of their own."""


@contextmanager
def reported(go_on: str = "", *, quiet: bool = False, log_format: LogFormat = LogFormat.text) -> Iterator[Progress]:
    """Yield a command's progress, and turn its end into an exit code: a user's error is one message and 1.

    Ctrl-C is 130, SIGTERM 143 and SIGHUP 129, each with a word on how to go on.

    A bug keeps its traceback. Warnings are shown as progress is. With `log_format` json, errors are events too, and the
    last event is `finished`. Of the ranks of one job the first alone shows progress.
    """
    began, code = time.monotonic(), 1
    events = EventProgress() if log_format is LogFormat.json else None
    silent = quiet or not is_first_rank()
    progress = open_progress(quiet=silent, log_format=log_format)
    if silent or events or not is_live(sys.stderr):
        for name in _LIBRARY_BARS:
            os.environ.setdefault(name, "1")
    try:
        with stops_raised(), _warnings_shown(progress):
            try:
                yield progress
                code = 0
            finally:
                progress.finish()
    except typer.Exit as done:
        code = done.exit_code
    except KeyboardInterrupt as error:
        code = 128 + signal_of(error)
        said = f"{error} " if str(error) else "Stopped. "
        if is_first_rank():  # all ranks stop at a signal; one of them says so
            _report(f"{said}{go_on}".rstrip() + _met_meanwhile(error.__cause__), code, events)
    except Exception as error:
        message = _users_error(error, go_on)
        if message is None and events is None:
            raise
        _report(message or f"A bug of dflash: {error!r}", code, events, error if message is None else None)
    finally:
        if events and not isinstance(progress, Silent):
            events.event("finished", exit_code=code, seconds=round(time.monotonic() - began, 3))
    if code:
        raise typer.Exit(code)


def _met_meanwhile(error: BaseException | None) -> str:
    """Return what to say of the error in which work ended that a signal had been asked to stop."""
    if not isinstance(error, Exception) or isinstance(error, typer.Exit):
        return ""
    return f"\nIt ended in an error meanwhile: {_users_error(error, '') or repr(error)}"


def _users_error(error: Exception, go_on: str) -> str | None:
    """Return the message for an error that is no bug of this program; None for a bug."""
    if isinstance(error, DflashError):
        return with_urls(str(error))
    if any(text in str(error) for text in _NO_THREAD):
        return (
            f"This process may start no further thread or process: {' '.join(str(error).split())}. Let it have more "
            f"(`ulimit -u` and `ulimit -v` show the limits), or start fewer: OMP_NUM_THREADS=1. {go_on}".rstrip()
        )
    if isinstance(error, ImportError) and _NO_FILE in str(error):
        return f"{error}. {_ADVICE[errno.EMFILE]}{go_on}".rstrip()
    if found := missing_memory(error):
        return f"This process has too little memory: {found}. Let it have more, or do less at once. {go_on}".rstrip()
    if isinstance(error, OSError) and error.errno in _OUTSIDE_FAULTS:
        place = f"{with_urls(str(error.filename))}: " if error.filename else ""
        return f"{place}{error.strerror}. {_ADVICE.get(error.errno or 0, '')}{go_on}".rstrip()
    return None


def _report(message: str, code: int, events: EventProgress | None, bug: Exception | None = None) -> None:
    rank = os.environ.get("RANK", "0")
    if events is None:
        print(f"dflash{'' if rank == '0' else f', rank {rank}'}: {message}", file=sys.stderr)
        return
    where = {"traceback": "".join(traceback.format_exception(bug))} if bug else {}
    events.event("error", message=message, exit_code=code, rank=rank, **where)


class _LogShown(logging.Handler):
    """Shows the log records of libraries, each by one call with its message and the logger's name."""

    def __init__(self, show: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._show(record.getMessage(), record.name)


@contextmanager
def _warnings_shown(progress: Progress) -> Iterator[None]:
    """Show Python's warnings and the log records of libraries above the bar, or as events; nothing of them if quiet."""

    def show(message: str, source: str) -> None:
        if isinstance(progress, EventProgress):
            progress.event("warning", message=message, source=source)
        else:
            progress.say(f"{source}: {message}")

    def show_warning(message: Warning | str, category: type[Warning], *_place: object) -> None:
        show(str(message), category.__name__)

    handler = _LogShown(show)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def is_first_rank() -> bool:
    """Say whether this process is the rank that prints; without torchrun it is."""
    return os.environ.get("RANK", "0") == "0"
