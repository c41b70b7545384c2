"""Progress on the terminal: a bar, or plain lines every few seconds where no terminal is. Always on stderr."""

import sys
import threading
import time
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of a log file."""


class TerminalProgress:
    """Shows what a stage does; safe in threads."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._lock = threading.Lock()
        self._bar: tqdm[None] | None = None
        self._lines: _PlainLines | None = None
        self._figures: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if not self._quiet:
            tqdm.write(text, file=self._stream)

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a piece of work of `total` units, `done` of which were finished before."""
        self._figures = {}
        settings: dict[str, Any] = {"total": total, "initial": done, "unit": f" {unit}", "unit_scale": unit == "tokens"}
        if self._live:
            self._bar = tqdm(desc=what, file=self._stream, dynamic_ncols=True, **settings)
        elif not self._quiet:
            self._lines = _PlainLines(self._stream, {"prefix": what, **settings})

    def advance(self, amount: int, **figures: str) -> None:
        """Note that `amount` more units are finished; figures are shown beside the bar."""
        with self._lock:
            self._figures.update(figures)
            if self._bar is not None:
                self._bar.set_postfix(self._figures, refresh=False)
                self._bar.update(amount)
            elif self._lines is not None:
                self._lines.advance(amount, self._figures)

    def finish(self) -> None:
        """Close the bar, or print the last line."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            elif self._lines is not None:
                self._lines.print(self._figures)
            self._bar = self._lines = None


class _PlainLines:
    """The same figures as a bar's, a line every few seconds."""

    def __init__(self, stream: TextIO, settings: dict[str, Any]) -> None:
        self._stream = stream
        self._settings = settings
        self._done = settings["initial"]
        self._began = self._printed = time.monotonic()

    def advance(self, amount: int, figures: dict[str, str]) -> None:
        self._done += amount
        if time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self.print(figures)

    def print(self, figures: dict[str, str]) -> None:
        self._printed = time.monotonic()
        line = tqdm.format_meter(
            n=self._done,
            elapsed=self._printed - self._began,
            postfix=", ".join(f"{name}={value}" for name, value in figures.items()),
            bar_format="{desc}: {n_fmt}/{total_fmt}{unit}, {elapsed}<{remaining}, {rate_fmt}{postfix}",
            **self._settings,
        )
        print(line.strip(), file=self._stream, flush=True)
