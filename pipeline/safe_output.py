"""What reaches a terminal: it obeys nothing that data, names, records or servers hold, but shows it."""

import re
import sys
from io import TextIOWrapper
from typing import Any, TextIO, cast

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that move, colour, reorder, hide or break what is shown: controls but tab and line end, marks of direction
and of no width, tags, and halves of characters, which no encoding has."""


def safe(text: str) -> str:
    """Return a text whose control characters a terminal shows, as escapes, instead of obeying them."""
    return _OBEYED.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found.group())
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class SafeOutput(TextIOWrapper):
    """A text stream that makes all it is given safe; what its encoding lacks is written as an escape, too."""

    def __init__(self, stream: TextIOWrapper) -> None:
        stream.flush()
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._same = stream  # which would close what both write to, once nobody holds it

    def write(self, text: str, /) -> int:
        """Write a text safely."""
        super().write(safe(text))
        return len(text)


class _Obeyed:
    """The same stream for who moves a terminal's cursor and colours it, and makes safe what is shown between."""

    def __init__(self, stream: SafeOutput) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """From now on, have all of this process that prints to stdout or stderr print safely, tracebacks included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper) and not isinstance(stream, SafeOutput):
            setattr(sys, name, SafeOutput(stream))


def obeyed(stream: TextIO) -> TextIO:
    """Return a stream by which a terminal is controlled, of one that may be guarded."""
    return cast(TextIO, _Obeyed(stream)) if isinstance(stream, SafeOutput) else stream
