"""Answers so far, on disk: a line each, appended as they come, so that a killed run loses at most the last ones.

A line is the CRC-32 of a JSON object, a blank and the object: {"row", "content", ...}. A row's lines are its turns in
order; rows stand as their answers came, in an order that differs from the data's by no more than the rows that were
being answered at once.
"""

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from dflash_offline.schemas.checked import Count, checked
from dflash_offline.schemas.files import append, open_kept
from dflash_offline.schemas.sealed import parse_json
from dflash_offline.stages.answers.dialogues import Answer, Dialogue

SYNC_INTERVAL_S = 2.0
"""Seconds of answers that a power cut may cost; a killed process loses none that was noted."""
_AGAIN = "Remove its folder to have every row answered again."


class _Row(TypedDict):
    row: Count


class Journal:
    """An append-only file of answers. What follows a torn or damaged line is cut off, and asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_kept(path, "a")
        self._file.truncate(_valid_bytes(path))
        self._synced = time.monotonic()

    def note(self, noted: Iterable[tuple[Dialogue, Answer]]) -> None:
        """Keep answers, each the newest of its dialogue."""
        lines = [_line(dialogue, answer) for dialogue, answer in noted]
        append(self._file, b"".join(lines))
        if time.monotonic() - self._synced >= SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Make the answers durable."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Make the answers durable and close the file."""
        self.sync()
        self._file.close()

    def replay(self, dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
        """Yield the dialogues in order, each with the answers that were kept when this call began to read.

        Holds no more answers than lie between a row's first and its last line.
        """
        waiting: dict[int, list[Answer]] = {}
        with self.path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            for dialogue in dialogues:
                for answer in waiting.pop(dialogue.index, []):
                    dialogue.add(answer)
                while dialogue.is_open and file.tell() < end:
                    row, answer = _entry(file.readline(), self.path)
                    if row == dialogue.index:
                        dialogue.add(answer)
                    else:
                        waiting.setdefault(row, []).append(answer)
                yield dialogue


def _line(dialogue: Dialogue, answer: Answer) -> bytes:
    fields = {name: value for name, value in asdict(answer).items() if value}
    content = json.dumps({"row": dialogue.index, **fields}).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _entry(line: bytes, path: Path) -> tuple[int, Answer]:
    document = parse_json(line[9:], path)
    return checked(document, _Row, path, _AGAIN)["row"], checked(document, Answer, path, _AGAIN)


def _valid_bytes(path: Path) -> int:
    """Return how many bytes of whole, undamaged lines the file begins with."""
    valid = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
                break
            valid += len(line)
    return valid
