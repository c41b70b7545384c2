"""Which content was seen before, in some 21 bytes for each: a set of Python's own takes four times as much."""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

_SIZE = 16
"""Bytes of a digest."""
_EMPTY = bytes(_SIZE)
_PARTS = 16
"""Tables that grow by themselves, so that only one at a time is held twice."""
_FULLEST = 0.8
_GROWTH = 1.125
_FIRST_SLOTS = 64


class Digests:
    """A set of 16-byte digests that are evenly spread, as hashes are."""

    def __init__(self) -> None:
        self._tables = [_table(_FIRST_SLOTS) for _ in range(_PARTS)]
        self._counts = [0] * _PARTS

    def add(self, digest: bytes) -> bool:
        """Add a digest; returns whether it is new."""
        part = digest[0] % _PARTS
        table = self._tables[part]
        slot = _slot(table, digest)
        if table[slot : slot + _SIZE] == digest:
            return False
        table[slot : slot + _SIZE] = digest
        self._counts[part] += 1
        if self._counts[part] > _FULLEST * len(table) / _SIZE:
            self._tables[part] = _grown(table)
        return True


def _table(slots: int) -> mmap:
    """Return an empty table, in pages of its own: what the heap is given back in such pieces it hardly uses again."""
    return mmap(-1, slots * _SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS)


def _slot(table: mmap, digest: bytes) -> int:
    """Return where a digest stands in a table, or where it would."""
    slot = int.from_bytes(digest[8:]) % (len(table) // _SIZE) * _SIZE
    while table[slot : slot + _SIZE] not in (_EMPTY, digest):
        slot = (slot + _SIZE) % len(table)
    return slot


def _grown(table: mmap) -> mmap:
    larger = _table(int(len(table) // _SIZE * _GROWTH))
    for begin in range(0, len(table), _SIZE):
        digest = table[begin : begin + _SIZE]
        if digest != _EMPTY:
            slot = _slot(larger, digest)
            larger[slot : slot + _SIZE] = digest
    return larger
