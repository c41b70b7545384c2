"""Files are written, and hashed, as they were given; a sealed document is accepted in no other way."""

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from feature_writer import create, fill_cache

from dflash_offline.schemas import files, sealed
from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import write_synced
from dflash_offline.schemas.sealed import _holds, read_sealed, sealed_bytes


def test_a_record_is_accepted_from_its_text(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=1)
    fill_cache(tmp_path / "cache")
    content = commit_path(tmp_path / "cache", 0).read_bytes()
    assert _holds(content) and not _holds(content[:-1])
    for settled_by_writing_it_anew in ({"reason": "not finite"}, {"before": "checksum"}, {"path": "a\\b"}):
        assert not _holds(sealed_bytes(settled_by_writing_it_anew))


def test_a_sealed_document_with_any_other_byte_anywhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = sealed_bytes({"files": {"a": {"size": 1}, "b": {}}, "layers": [-1.5, {"id": None}], "skipped": []})
    given = bytearray(content)
    monkeypatch.setattr(sealed, "read_bounded", lambda _path, _most: bytes(given))
    assert _holds(content) and read_sealed(Path("record"))["skipped"] == []
    for position, right in enumerate(content):
        for wrong in range(256):
            given[position] = wrong
            with suppress(CacheError):
                read_sealed(Path("record"))
                assert wrong == right, (position, wrong)
        given[position] = right


def test_a_sealed_document_laid_out_in_another_way_is_refused(tmp_path: Path) -> None:
    content = sealed_bytes({"files": {"a": {"size": 1}, "b": {}}, "layers": [1, 2], "skipped": []})
    others = [re.sub(rb"\n *", b"", content) + b"\n", content.replace(b": ", b":"), content.replace(b"{}", b"{\n  }")]
    for place in re.finditer(rb"\s+", content):
        changed = (place[0] + b" ", place[0] + b"\n", place[0][:-1], b"\n" + place[0])
        others += [content[: place.start()] + space + content[place.end() :] for space in changed]
    for other in others:
        (tmp_path / "record").write_bytes(other)
        with pytest.raises(CacheError, match=r"is damaged|cannot be read"):
            read_sealed(tmp_path / "record")


def test_a_failed_sync_of_a_part_is_told_although_later_ones_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fails_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fails_once)

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            yield b"x" * 100
            time.sleep(0.05)

    with pytest.raises(OSError, match="Input/output error") as caught:
        write_synced(tmp_path / "file", pieces())
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("length", [100, 1 << 21])
def test_a_piece_may_change_once_the_second_after_it_is_asked_for(
    tmp_path: Path, length: int, slow_digest: None
) -> None:
    expected = hashlib.sha256()

    def pieces() -> Iterator[np.ndarray]:
        memory = [np.empty(length, np.uint8) for _ in range(2)]
        for number in range(12):
            memory[number % 2][:] = number
            expected.update(memory[number % 2])
            yield memory[number % 2]
        yield b""

    sha256 = write_synced(tmp_path / "file", pieces())
    content = (tmp_path / "file").read_bytes()
    assert sha256 == expected.hexdigest() == hashlib.sha256(content).hexdigest()
    assert content == b"".join(bytes([number]) * length for number in range(12))
