"""Progress: what is said of work under way, where it fits, and what a program reads."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import pytest

from dflash_offline.pipeline import progress
from dflash_offline.pipeline.progress import EventProgress, LogFormat, TerminalProgress, Work, open_progress
from dflash_offline.stages.progress import Silent


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def work(total: int | None, done: int = 0) -> Work:
    return Work(what="Walking", unit="steps", total=total, first=done, done=done)


def test_time_left_of_resumed_work_counts_only_what_was_done_here(clock: Clock) -> None:
    resumed = work(1000, done=900)
    assert resumed.seconds_left() is None
    clock.now += 10
    resumed.advance(10, {})
    assert resumed.rate() == pytest.approx(1) and resumed.seconds_left() == pytest.approx(90)


def test_time_left_forgets_a_slow_start_and_bears_a_pause(clock: Clock) -> None:
    begun = work(1000)
    clock.now += 600  # compiling
    begun.advance(1, {})
    for _ in range(60):
        clock.now += 1
        begun.advance(2, {})
    assert begun.seconds_left() == pytest.approx((1000 - 121) / 2)
    clock.now += 3600
    assert begun.seconds_left() is not None and begun.seconds_left() > 3600


def test_without_a_known_total_no_time_left_is_told(clock: Clock) -> None:
    for total in (None, 3):
        unknown = work(total)
        clock.now += 2
        unknown.advance(5, {})  # more than the total that was expected
        assert unknown.seconds_left() is None
        said = ", ".join(unknown.parts(ended=False))
        assert said.startswith("5 steps, 00:02, 2.5/s") and "left" not in said and "%" not in said


def test_lines_of_a_log_file_come_every_few_seconds_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    shown = TerminalProgress(stream)
    shown.start("Walking", 300, "steps", done=100)
    for _ in range(20):
        clock.now += 1
        shown.advance(10, loss=1.23456, shards="1/2")
    shown.finish()
    shown.finish()
    shown.say("Said.")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Walking: 150/300 steps, 50%, 00:15 left, 10/s, loss 1.23, shards 1/2"
    assert lines[-2] == "Walking: 300/300 steps, 100%, 00:20, 10/s, loss 1.23, shards 1/2"
    assert lines[-1] == "Said." and len(lines) == 6 and not set("\r\033") & set(stream.getvalue())


def test_events_are_json_lines_with_numbers(clock: Clock) -> None:
    stream = io.StringIO()
    shown = EventProgress(stream)
    shown.start("Walking", 300, "steps", done=100)
    for _ in range(10):
        clock.now += 1
        shown.advance(10, loss=math.nan, accept=2.5, shards="1/2")
    shown.say("two\nlines")
    shown.finish()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "progress", "message", "end"]
    assert events[1] == {
        **{"event": "progress", "time": 1005.0, "what": "Walking", "done": 150, "total": 300, "unit": "steps"},
        **{"rate": 10.0, "seconds": 5.0, "seconds_left": 15.0},
        "figures": {"loss": None, "accept": 2.5, "shards": "1/2"},
    }
    assert events[3]["message"] == "two\nlines" and events[4]["done"] == 200


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_quiet_shows_nothing(log_format: LogFormat) -> None:
    assert isinstance(open_progress(quiet=True, log_format=log_format), Silent)


@contextmanager
def on_terminal(columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """Give a terminal to print on, and a list that holds at the end what was printed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the system's word for the end of a terminal
            while part := os.read(master, 1 << 16):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        yield stream, parts
    reader.join()
    os.close(master)


@pytest.mark.parametrize("columns", [120, 80, 50, 30])
@pytest.mark.parametrize("total", [600, None])
def test_a_bar_and_what_is_said_above_it_fit_the_terminal(
    columns: int, total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_REDRAW_S", 0)
    with on_terminal(columns) as (stream, parts):
        shown = TerminalProgress(stream)
        shown.start("Walking", total, "steps")
        for number in range(3):
            time.sleep(0.01)
            shown.advance(100, loss=1.23, shards=f"{number}/24", written="12.3 MiB")
        shown.say("A message that goes on for longer than any of these terminals is wide, and then somewhat more; " * 2)
        shown.finish()
    printed = b"".join(parts).decode()
    drawn = [part for line in printed.split("\n") for part in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).split("\r")]
    assert max(len(part.rstrip()) for part in drawn) <= columns
    assert any("300" in part and "steps" in part for part in drawn)
    assert any("█" in part or "#" in part for part in drawn) == (total is not None)
    if columns == 120:
        assert any("written 12.3 MiB" in part for part in drawn)
