"""Progress on stderr: a bar on a terminal, plain lines every few seconds elsewhere, or events that a program reads."""

import json
import math
import os
import sys
import textwrap
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TextIO

from tqdm import tqdm

from dflash_offline.pipeline.safe_output import obeyed, safe
from dflash_offline.stages.progress import Figure, Progress, Silent

INTERVAL_S = 5.0
"""Seconds between two lines or events of one piece of work, at least."""
_RATE_MARKS = 31
"""A rate spans this many points, a second or more apart: it forgets a slow start, and a pause does not spoil it."""
_REDRAW_S = 0.1
_WRAPPING: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
_SMALLEST_BAR = 10


class LogFormat(StrEnum):
    """How a command says on stderr what it does."""

    text = "text"
    json = "json"


def open_progress(*, quiet: bool, log_format: LogFormat) -> Progress:
    """Return what shows a command's progress on stderr: nothing, events, or text."""
    if quiet:
        return Silent()
    return EventProgress() if log_format is LogFormat.json else TerminalProgress()


@dataclass(kw_only=True)
class Work:
    """A piece of work: how much of it is done, how fast it goes, and how long the rest will take."""

    what: str
    unit: str
    total: int | None
    first: int
    """Units that were done before it began."""
    done: int
    figures: dict[str, Figure] = field(default_factory=dict)
    began: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self._marks = deque([(self.began, self.done)], maxlen=_RATE_MARKS)

    def advance(self, amount: int, figures: dict[str, Figure]) -> None:
        """Count finished units, and take the newest figures."""
        self.done += amount
        self.figures |= figures
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.done))

    @property
    def seconds(self) -> float:
        """Seconds since the work began in this process."""
        return time.monotonic() - self.began

    def rate(self) -> float | None:
        """Return the recent rate in units a second; None before any unit was done."""
        since, then = self._marks[0]
        if self.done <= then:  # nothing lately: the mean of all is what is known
            since, then = self.began, self.first
        return (self.done - then) / max(time.monotonic() - since, 1e-9) if self.done > then else None

    def seconds_left(self) -> float | None:
        """Return how long the rest will take; None where the total or the rate is not known."""
        rate = self.rate()
        if self.total is None or self.done > self.total or rate is None:
            return None
        return (self.total - self.done) / rate

    def parts(self, ended: bool) -> list[str]:
        """Return the parts of the line that shows the work, the most important first."""
        total = self.total if self.total is not None and self.done <= self.total else None
        parts = [f"{_count(self.done)}{'' if total is None else f'/{_count(total)}'} {self.unit}"]
        if total:
            parts.append(f"{self.done / total:.0%}")
        left = None if ended else self.seconds_left()
        parts.append(tqdm.format_interval(self.seconds) if left is None else f"{tqdm.format_interval(left)} left")
        rate = (self.done - self.first) / max(self.seconds, 1e-9) if ended else self.rate()
        if rate:
            parts.append(f"{_count(rate)}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        return parts + [f"{name} {_figure(value)}" for name, value in self.figures.items()]


class TerminalProgress:
    """Shows a stage's work as a bar on a terminal and as lines elsewhere; safe to use from several threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or obeyed(sys.stderr)
        self._live = is_live(self._stream)
        self._lock = threading.Lock()
        self._work: Work | None = None
        self._bar: tqdm[None] | None = None
        self._shown = 0.0

    def say(self, text: str) -> None:
        """Print a message above the bar; on a terminal as wide as that, in a log file in one line."""
        text = safe(text)
        if self._live:
            lines = (textwrap.wrap(line, _width(self._stream), **_WRAPPING) or [""] for line in text.split("\n"))
            text = "\n".join(part for wrapped in lines for part in wrapped)
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a piece of work of `total` units, `done` of which were finished before."""
        self.finish()
        self._work = Work(what=what, unit=unit, total=total, first=done, done=done)
        self._shown = time.monotonic()
        if self._live:
            form = "{desc}" if total is None else "{desc} |{bar}|"
            self._bar = tqdm(file=self._stream, total=total, initial=done, bar_format=form, dynamic_ncols=True)
            self._draw(self._work, self._bar, ended=False)

    def advance(self, amount: int, **figures: Figure) -> None:
        """Note that `amount` more units are finished; figures are shown beside the bar."""
        with self._lock:
            if self._work is None:
                return
            self._work.advance(amount, figures)
            if time.monotonic() - self._shown < (INTERVAL_S if self._bar is None else _REDRAW_S):
                return
            if self._bar is not None:
                self._draw(self._work, self._bar, ended=False)
            else:
                self._print(self._work, ended=False)

    def finish(self) -> None:
        """Close the bar, or print the last line."""
        with self._lock:
            if self._work is not None and self._bar is not None:
                self._draw(self._work, self._bar, ended=True)
                self._bar.close()
            elif self._work is not None:
                self._print(self._work, ended=True)
            self._bar = self._work = None

    def _draw(self, work: Work, bar: "tqdm[None]", *, ended: bool) -> None:
        """Draw as many parts as the terminal has room for, and a bar where there is room left."""
        self._shown = time.monotonic()
        room = _width(self._stream) - (0 if work.total is None else _SMALLEST_BAR + 3) - 1
        parts = work.parts(ended)
        while len(parts) > 1 and len(f"{work.what}: {', '.join(parts)}") > room:
            parts.pop()
        bar.n, bar.desc = work.done, safe(f"{work.what}: {', '.join(parts)}")
        bar.refresh()

    def _print(self, work: Work, *, ended: bool) -> None:
        self._shown = time.monotonic()
        print(safe(f"{work.what}: {', '.join(work.parts(ended))}"), file=self._stream, flush=True)


class EventProgress:
    """Writes a stage's work as events, one JSON object a line; safe to use from several threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.RLock()
        self._work: Work | None = None
        self._shown = 0.0

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event with the time, in seconds since 1970."""
        with self._lock:
            line = json.dumps({"event": kind, "time": round(time.time(), 3), **fields}, allow_nan=False, default=str)
            print(line, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Write a message."""
        self.event("message", message=text)

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a piece of work of `total` units, `done` of which were finished before."""
        self.finish()
        with self._lock:
            self._work = Work(what=what, unit=unit, total=total, first=done, done=done)
            self._work_event("start")

    def advance(self, amount: int, **figures: Figure) -> None:
        """Note that `amount` more units are finished."""
        with self._lock:
            if self._work is not None:
                self._work.advance(amount, figures)
                if time.monotonic() - self._shown >= INTERVAL_S:
                    self._work_event("progress")

    def finish(self) -> None:
        """End the piece of work."""
        with self._lock:
            if self._work is not None:
                self._work_event("end")
            self._work = None

    def _work_event(self, kind: str) -> None:
        work, self._shown = self._work, time.monotonic()
        assert work is not None
        figures = {name: _json_number(value) for name, value in work.figures.items()}
        names = {"what": work.what, "done": work.done, "total": work.total, "unit": work.unit}
        rate, left = _json_number(work.rate()), _json_number(work.seconds_left())
        seconds = round(work.seconds, 3)
        self.event(kind, **names, rate=rate, seconds=seconds, seconds_left=left, figures=figures)


def is_live(stream: TextIO) -> bool:
    """Say whether a stream is a terminal on which a line can be drawn again."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no real terminal
        return 80


def _count(number: float) -> str:
    """Return a number as it is read at a glance: 0.52, 12.5, 950, 3,200, 1.25M."""
    if number >= 100_000:
        return str(tqdm.format_sizeof(number))
    return f"{number:.3g}" if number < 100 and number != int(number) else f"{number:,.0f}"


def _figure(value: Figure) -> str:
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value)


def _json_number(value: Figure | None) -> Figure | None:
    """Return a value as JSON can hold it; None for a number that is not finite."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None
