"""JSON as rows: lines, arrays read element by element, and single values, each with what is wrong with it."""

import codecs
import io
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_offline.stages.conversations.content import MOST_NESTED, is_too_deep
from dflash_offline.stages.conversations.reading import bounds
from dflash_offline.stages.conversations.reading.faults import shown
from dflash_offline.stages.conversations.reading.streams import (
    GET_WHOLE,
    PIECE,
    NumberedRows,
    first_line,
    open_stream,
    pass_over_line,
)

_TOO_DEEP = f"is nested more than {MOST_NESTED} deep"
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16
"""Characters that the end of a text may lack of a word or a number of JSON, more than any has."""


class _BrokenError(ValueError):
    """A JSON document ends too early or goes on wrongly."""

    what_to_do = GET_WHOLE


@dataclass
class _Decoder:
    """A JSON decoder that remembers keys which stand twice in one object, where it cannot be told which is meant."""

    doubled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled.append(next(name for name in names if names.count(name) > 1))
        return value

    def decode(self, text: str, at: int = 0) -> tuple[Any, int, str]:
        """Return the value that begins at `at`, where it ends, and its fault."""
        self.doubled.clear()
        value, end = self.decoder.raw_decode(text, at)
        fault = f"has the key {shown(self.doubled[0])} twice in one object" if self.doubled else ""
        brackets = text.count("[", at, end) + text.count("{", at, end)
        return value, end, _TOO_DEEP if brackets > MOST_NESTED and is_too_deep(value) else fault


def read_lines(path: Path) -> NumberedRows:
    """Yield the lines that are not blank, unparsed."""
    with open_stream(path) as stream:
        number = 0
        while content := stream.readline(bounds.MOST_LINE_BYTES):
            number += 1
            if len(content) == bounds.MOST_LINE_BYTES and not content.endswith(b"\n"):
                pass_over_line(stream, number)
                yield number, b"", bounds.TOO_LONG_LINE
            elif content.strip():
                yield number, content.removeprefix(codecs.BOM_UTF8) if number == 1 else content, ""


def parse_line(content: bytes) -> tuple[Any, str]:
    """Return the value of JSON that a line is, or what is wrong with it."""
    if bounds.has_too_many_values(content):
        return None, bounds.TOO_MANY_VALUES
    try:
        return parse_value(content.decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start}: {error.reason})"


def parse_value(text: str) -> tuple[Any, str]:
    """Return the value of JSON that a text is, or what is wrong with it."""
    if bounds.has_too_many_values(text):
        return None, bounds.TOO_MANY_VALUES
    try:
        text = text.strip(" \t\r\n")
        value, end, fault = _Decoder().decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except RecursionError:
        return None, _TOO_DEEP
    except ValueError as error:
        return None, f"is not JSON ({first_line(error)})"
    return value, fault


def read_document(path: Path) -> NumberedRows:
    """Yield the elements of an array one by one, or the one object that the file is."""
    decoder = _Decoder()
    with io.TextIOWrapper(open_stream(path), "utf-8-sig") as text:
        buffer = ""
        while not buffer and (piece := text.read(PIECE)):
            buffer = piece.lstrip()
        if not buffer.startswith("["):
            whole = buffer + text.read(bounds.MOST_LINE_BYTES)
            _refuse_larger(whole, 0, 1)
            value, end, fault = decoder.decode(whole)
            _refuse_more(whole, end)
            yield 1, pickle.dumps(value), fault
            return
        number, at, separator = 0, 1, ","
        while separator == ",":
            try:
                at = _end_of_blanks(buffer, at)
                if number == 0 and buffer[at] == "]":
                    end, fault, value, separator = at, "", None, "]"
                else:
                    value, end, fault = decoder.decode(buffer, at)
                    end = _end_of_blanks(buffer, end)
                    separator = buffer[end]
                    number += 1
            except (IndexError, json.JSONDecodeError) as error:
                _refuse_broken(error, buffer, number + 1)
                _refuse_larger(buffer, at, number + 1)
                # The element goes on beyond the buffer: twice as much each time tells at linear cost.
                piece = text.read(max(PIECE, len(buffer) - at))
                if not piece:
                    raise _BrokenError(f"row {number + 1} is broken or unfinished") from error
                buffer, at = buffer[at:] + piece, 0
                continue
            if separator not in ",]":
                raise _BrokenError(f"row {number} is followed by {separator!r}; expected , or ]")
            if number:
                yield number, pickle.dumps(value), fault
            at = end + 1
        _refuse_more(buffer[at:] + text.read(PIECE), 0)


def _refuse_broken(error: Exception, buffer: str, number: int) -> None:
    """Raise if a row is broken before the end of what was read, so that reading more of it cannot help."""
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string"):
        return
    if error.pos < len(buffer) - _LONGEST_WORD:
        broken = _BrokenError(f"row {number} is broken ({error.msg}), and where it ends cannot be told")
        broken.what_to_do = "Mend it, or write a row a line (jsonl), where --skip-bad-rows leaves it out"
        raise broken from error


def _refuse_larger(buffer: str, at: int, number: int) -> None:
    """Raise if what was read of one row is more than a row may hold."""
    if len(buffer) - at >= bounds.MOST_LINE_BYTES:
        raise _BrokenError(f"row {number} {bounds.TOO_LONG_LINE}, or is broken")
    if bounds.has_too_many_values(buffer[at:]):
        raise _BrokenError(f"row {number} {bounds.TOO_MANY_VALUES}, or is broken")


def _end_of_blanks(text: str, at: int) -> int:
    blanks = _BLANKS.match(text, at)
    assert blanks is not None
    return blanks.end()


def _refuse_more(text: str, end: int) -> None:
    if text[end:].strip():
        raise _BrokenError("more follows the end of the document")
